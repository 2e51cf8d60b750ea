"""Dynamic inference on one member of every family: samples that leave the batch change nothing. Marker `zoo`."""

import random

import pytest
import torch
from helpers.families import DEPTHS, FAMILIES, OTHER_PX, make_small
from helpers.routing import assert_equals_simulation, draw_policy
from torch import nn

from timm_multiexit.inference.routing import find_leaving
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings('ignore')]

# Exits where no sample can leave the batch alone, and what goes on from there beside the tapped tensor.
STUCK = {
    'CoaT': (0, 1, 2),  # reshapes to the batch size that came in; all stages meet again in the parallel blocks
    'DeepseekVitClassifier': (0, 1, 2),  # reshapes to the batch size that came in
    'EfficientViM': (1,),  # main reads features of all stages
    'EfficientViMDistilled': (1,),
    'Gemma4VitClassifier': (0, 1, 2),  # positions are embedded for every image at the start
    'NASNetALarge': (0, 1, 2),  # the tap is inside a cell, and a cell reads the two before it
    'PNASNet5Large': (0, 1, 2),
    'Qwen3VitClassifier': (0, 1, 2),  # reshapes to the batch size that came in
    'TNT': (0, 1, 2),  # pixel tokens go beside the patch tokens, many rows to an image
    'Twins': (0, 1, 2),  # reshapes to the batch size that came in
}


def make_images(model, count):
    """Images of different brightness and contrast: with equal statistics, untrained networks tell none apart."""
    contrast = torch.linspace(0.3, 3, count).view(count, 1, 1, 1)
    return torch.randn(count, *model.input_size) * contrast + torch.randn(count, 3, 1, 1)


@torch.no_grad()
def enliven(model, images):
    """Move what timm starts at zero, one or almost zero, and fit the norms, so that answers depend on the images.

    In float64: what another batch size changes in float32, fitted norms amplify to as much as 4e-4 of the logits.
    """
    for param in model.parameters():
        if param.ndim < 2:
            param.add_(torch.rand_like(param) * 0.4 - 0.1)
    for param in model.classifier_parameters():
        if param.ndim > 1:
            param.normal_(std=param.shape[1] ** -0.5)
    model.double()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(images.double(), exits=True)
    for norm in norms:
        norm.eval()


def spreading_thresholds(logits):
    """Return thresholds of confidence by which about as many samples leave at every exit, and how many are left."""
    thresholds, left, counts = [], torch.arange(len(logits[0])), [len(logits[0])]
    for idx, single in enumerate(logits[:-1]):
        scores = single.softmax(-1).amax(-1)[left]
        num_leaving = max(1, len(left) // (len(logits) - idx))
        ordered = scores.sort(descending=True).values
        assert ordered[num_leaving - 1] - ordered[num_leaving] > 1e-9
        thresholds.append(float(ordered[num_leaving - 1 : num_leaving + 1].mean()))
        left = left[scores < thresholds[-1]]
        counts.append(len(left))
    return tuple(thresholds), counts


def assert_same(prediction, expected, scale):
    assert prediction.exit_idx.tolist() == expected.exit_idx.tolist()
    torch.testing.assert_close(prediction.logits, expected.logits, rtol=0, atol=1e-6 * scale)


def test_families_with_stuck_exits_are_families():
    assert set(STUCK) | set(OTHER_PX) | set(DEPTHS) <= set(FAMILIES)


@pytest.mark.parametrize('family', FAMILIES)
def test_samples_that_leave_the_batch_get_and_leave_the_same_answers(family):
    model = make_small(family)
    num_exits = len(model.exits)
    can_leave = tuple(idx not in STUCK.get(family, ()) for idx in range(num_exits))
    assert model.can_leave == can_leave
    x = make_images(model, 2 * num_exits + 2)
    enliven(model, x)
    assert find_leaving(model.backbone, model._taps, model.input_size) == can_leave

    x = x.double()
    with torch.no_grad():
        logits = model(x, exits=True).logits
    scale = float(torch.stack(logits).abs().amax())
    for single in logits:  # a mix-up would show
        assert float(torch.pdist(single).amin()) > 1e-3 * scale
    thresholds, counts = spreading_thresholds(logits)
    assert all(before > after > 0 for before, after in zip(counts, counts[1:]))

    batch_sizes = []
    hooks = [head.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0]))) for head in model.exits]
    spread = ExitPolicy('confidence', thresholds)
    assert_same(model.infer(x, spread), apply_policy(spread, logits), scale)
    expected = [counts[0]]
    for idx in range(num_exits - 1):
        expected.append(counts[idx + 1] if can_leave[idx] else expected[-1])
    assert batch_sizes == expected
    for hook in hooks:
        hook.remove()

    for combine, values in (('mean', thresholds), (None, (0.0,) * num_exits), (None, (1.0,) * num_exits)):
        policy = ExitPolicy('confidence', values, combine=combine)
        assert_same(model.infer(x, policy), apply_policy(policy, logits), scale)
    for size in (1, 2, 5):
        expected = apply_policy(spread, [single[:size] for single in logits])
        assert_same(model.infer(x[:size], spread), expected, scale)

    draw = random.Random(family)
    x = make_images(model, draw.choice([9, 16, 33, 64])).double()
    with torch.no_grad():
        many = model(x, exits=True).logits
    policy, scores = draw_policy(draw, many)
    assert_equals_simulation(model.infer(x, policy), policy, many, scores)


@pytest.mark.parametrize('family', FAMILIES)
def test_exits_come_one_by_one_as_they_come_together(family):
    model = make_small(family)
    x = make_images(model, 2)
    with torch.no_grad():
        expected = model(x, exits=True).logits
        steps = list(model.anytime(x))
    assert [idx for idx, _ in steps] == list(range(len(expected)))
    for (_, logits), single in zip(steps, expected):
        torch.testing.assert_close(logits, single, rtol=1e-4, atol=1e-5)
