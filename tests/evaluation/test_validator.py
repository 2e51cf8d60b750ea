"""Validation: which images and weights it is of, and what it measures."""

import dataclasses
import logging
from argparse import Namespace

import pytest
import torch
from helpers.validation import make_validator, parse
from timm.data import create_loader

from timm_multiexit.calibration.logits import collect_logits
from timm_multiexit.cli.validate import read_questions
from timm_multiexit.cli.validate_data import create_split
from timm_multiexit.data.datasets import create_checked_dataset
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.data.holdout import hold_out
from timm_multiexit.evaluation.validator import Questions, Validator
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError


@pytest.fixture
def model(make_model):
    return make_model(exits=[1, 3], input_size=(3, 32, 32)).eval()


# What thresholds are chosen on


def test_part_of_the_reported_images_is_refused_by_what_is_seen(model):
    """Where images have no file names, after evaluation; what was found by then is shown."""
    args, shown = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32'), []
    validator = make_validator(args, model, show=shown.append)
    part = hold_out(create_split(args, 'test', 3), 20, seed=1)[1]
    validator.data = dataclasses.replace(validator.data, calibration=(part, 'a part'))
    with pytest.raises(MultiExitError, match='are the same images'):
        validator.run()
    assert 'on the test split, 360 images' in shown[0]
    assert 'Failure AUROC' in shown[1]


def test_an_image_that_is_there_twice_is_warned_of(model, caplog):
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32')
    validator = make_validator(args, model)
    loader = [(torch.randn(50, 3, 32, 32), torch.zeros(50, dtype=torch.int64))]
    validator._collect = lambda _: collect_logits(model, loader)
    reported = [(torch.cat([loader[0][0][:2], torch.randn(8, 3, 32, 32)]), loader[0][1][:10])]
    with caplog.at_level(logging.WARNING):
        validator._calibrate(collect_logits(model, reported))
    assert caplog.messages == ['2 of 50 images that thresholds are chosen on are among those reported.']


def test_held_out_images_are_those_of_training_and_not_augmented(model):
    """The same choice as train.py's, through the evaluation transform: the logits of a loader made by hand."""
    args = parse('--model', 'test_resnet', '--calib-from-train', '150', '--seed', '7', '--img-size', '32')
    validator = make_validator(args, model)
    collected, source = validator._calibrate(
        collect_logits(model, [(torch.zeros(1, 3, 32, 32), torch.zeros(1).long())])
    )
    assert source == '150 images drawn from the train split with seed 7'  # the run is not known
    train = create_checked_dataset(DIGITS, root=None, split='train')
    _, held_out = hold_out(train, 150, seed=7)
    keys = ('mean', 'std', 'interpolation', 'crop_pct')
    prepared = {key: validator.data.config[key] for key in keys}
    loader = create_loader(held_out, (3, 32, 32), 256, num_workers=0, use_prefetcher=False, **prepared)
    images, target = next(iter(loader))
    assert torch.equal(collected.targets, target)
    with torch.no_grad():
        torch.testing.assert_close(collected.logits[0], model(images, exits=True).logits[0], rtol=1e-4, atol=1e-4)


def test_same_images_under_two_names_are_refused_by_their_logits(model, monkeypatch):
    """Some data sets take several names for one split."""
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32')
    validator = make_validator(args, model)
    same = create_split(args, 'test', 3), 'the test split'
    validator.data = dataclasses.replace(validator.data, calibration=same)
    with pytest.raises(MultiExitError, match='--calib-split validation and --split test are the same images'):
        validator.run()


# What is measured


def test_budgets_and_drops_need_images_to_choose_thresholds_on(model):
    data = make_validator(parse('--model', 'test_resnet', '--img-size', '32'), model).data
    for questions in (Questions(budgets=('90%',)), Questions(max_drop=0.1)):
        with pytest.raises(InvalidValueError, match='need images to choose thresholds on'):
            Validator(model, data, questions, accelerator=None)


def test_several_processes_give_the_table_alone(model, monkeypatch):
    validator = make_validator(parse('--model', 'test_resnet', '--img-size', '32'), model)
    validator.accelerator = Namespace(num_processes=2)
    assert not validator._keeps_logits()


def test_logits_that_nobody_asked_for_are_not_kept_beyond_memory(model, monkeypatch):
    validator = make_validator(parse('--model', 'test_resnet', '--img-size', '32'), model)
    size = 4 * 360 * 10 * 3
    monkeypatch.setattr('timm_multiexit.evaluation.validator._MAX_BYTES', size)
    assert validator._keeps_logits()
    monkeypatch.setattr('timm_multiexit.evaluation.validator._MAX_BYTES', size - 1)
    assert not validator._keeps_logits()
    validator.questions = read_questions(parse('--model', 'a', '--threshold', '0.5'), 2)
    assert validator._keeps_logits()
