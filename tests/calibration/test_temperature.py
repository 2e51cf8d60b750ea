"""Temperatures against a fine grid."""

import math

import pytest
import torch
from helpers.samples import make_samples
from torch.nn.functional import cross_entropy

from timm_multiexit.calibration.temperature import fit_temperatures


def test_temperature_is_the_best_of_a_fine_grid():
    logits, targets = make_samples(400, classes=10)
    logits = [scale * single for scale, single in zip((0.1, 0.7, 4.0, 50.0), logits)]
    grid = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    for single, fitted in zip(logits, fit_temperatures(logits, targets)):
        losses = torch.stack([cross_entropy(single.double() / value, targets) for value in grid])
        assert fitted == pytest.approx(float(grid[losses.argmin()]), rel=2e-3)


def test_temperature_stays_in_its_range():
    logits, targets = make_samples(200, classes=5)
    useless = torch.randn(200, 5)
    wrong = -5 * torch.nn.functional.one_hot(targets, 5).float()
    tiny = 1e-4 * logits[0]
    assert fit_temperatures([useless, wrong, tiny], targets)[1:] == pytest.approx((100, 0.01), rel=1e-5)
    assert fit_temperatures([useless, tiny], targets)[0] > 3


def test_classifier_without_a_mistake_keeps_temperature_one():
    targets = torch.arange(5)
    assert fit_temperatures([3 * torch.eye(5), torch.randn(5, 5)], targets)[0] == 1


def test_masked_classes_do_not_count_in_the_temperature():
    logits, targets = make_samples(300, classes=6)
    masked = [torch.cat([single, torch.full((300, 2), -math.inf)], 1) for single in logits]
    assert fit_temperatures(masked, targets) == pytest.approx(fit_temperatures(logits, targets), rel=1e-5)
