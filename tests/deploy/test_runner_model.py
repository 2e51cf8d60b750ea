"""The runner of a real export answers as the model itself does."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_multiexit as tme
from timm_multiexit.deploy.runner import Runner
from timm_multiexit.policies.policy import CRITERIA


@pytest.fixture(scope='module')
def images(small):
    """Images of different contrast, of which some are easy."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, *small.input_size, generator=generator) * torch.linspace(0.2, 4, 16).view(-1, 1, 1, 1)
    return images + torch.randn(16, 3, 1, 1, generator=generator)


def draw_policy(rng, logits):
    """A policy of any kind, its thresholds between the scores of two images."""
    criterion, combine = str(rng.choice(list(CRITERIA))), [None, 'mean', 'geometric'][rng.integers(3)]
    temperatures = tuple(float(value) for value in rng.uniform(0.5, 3, len(logits))) if rng.random() < 0.5 else ()
    num_exits, thresholds = len(logits) - 1, []
    for idx in range(num_exits):
        if rng.random() < 0.25:
            thresholds.append(None)
        elif criterion == 'patience':
            thresholds.append(int(rng.integers(1, 3)))
        else:
            single = logits[idx] / (temperatures[idx] if temperatures else 1)
            scores = CRITERIA[criterion].score(single).sort().values
            place = int(rng.integers(len(scores) - 1))
            thresholds.append(float(scores[place : place + 2].mean()))
    return tme.ExitPolicy(criterion, tuple(thresholds), temperatures, combine)


@torch.no_grad()
def test_answers_are_those_of_the_model(exported, images):
    model, runner, rng = exported.model, Runner(exported.folder, threads=1), np.random.default_rng(0)
    steps = list(model.anytime(images))
    for (idx, logits), (found_idx, found) in zip(steps, runner.anytime(images.numpy()), strict=True):
        assert idx == found_idx
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(runner(images.numpy(), exit_idx=idx), logits, rtol=1e-4, atol=1e-5)
    logits, seen = [single for _, single in steps], set()
    for count in range(60):
        policy = draw_policy(rng, logits)
        size = (1, 2, 7, 16)[count % 4]
        expected, found = model.infer(images[:size], policy), runner.infer(images[:size].numpy(), policy.to_dict())
        np.testing.assert_array_equal(found.exit_idx, expected.exit_idx, err_msg=str(policy))
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        seen |= set(zip([policy.criterion] * size, found.exit_idx.tolist()))
    assert len(seen) >= 12
    own, expected = runner.infer(images.numpy()), model.infer(images)
    np.testing.assert_array_equal(own.exit_idx, expected.exit_idx)
    np.testing.assert_allclose(own.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_conditional_program_answers_where_there_are_no_stages(exported, images):
    runner = Runner(exported.folder, threads=1)
    _, logits = next(runner.anytime(images.numpy()))
    first, second = torch.from_numpy(logits).softmax(-1).topk(2).values.unbind(-1)
    policy = {'criterion': 'margin', 'combine': 'mean', 'thresholds': [float((first - second).median()), None, 0.3]}
    expected = runner.infer(images.numpy(), policy)
    runner._programs = {**runner._programs, 'stages': []}
    found = runner.infer(images.numpy(), policy)
    np.testing.assert_array_equal(found.exit_idx, expected.exit_idx)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(set(found.exit_idx.tolist())) > 1
    with pytest.raises(ValueError, match='leaves by margin, combine mean, and not by confidence, combine None'):
        runner.infer(images.numpy(), threshold=0.5)


def test_pictures_are_prepared_as_for_the_model(exported):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8))
    transform = create_transform(**{**resolve_model_data_config(exported.model), 'input_size': (3, 64, 64)})
    found = Runner(exported.folder, threads=1).preprocess(picture)
    np.testing.assert_allclose(found, transform(picture)[None], atol=1e-6)
