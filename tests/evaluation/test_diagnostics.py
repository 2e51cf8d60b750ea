"""Metrics of dynamic inference against hand-worked numbers and slow loops over samples."""

import math

import pytest
import torch
from helpers.logits import make_logits, of_probabilities

from timm_multiexit.evaluation.diagnostics import failure_auroc, measure_falls, measure_overthinking
from timm_multiexit.utils.errors import MultiExitError

# Failure AUROC


def test_auroc_of_all_pairs():
    logits, targets = make_logits(num=150)
    confidence, right = logits[1].softmax(-1).amax(-1), logits[1].argmax(-1) == targets
    pairs = [
        1.0 if high > low else 0.5 if high == low else 0.0 for high in confidence[right] for low in confidence[~right]
    ]
    assert failure_auroc(logits[1], targets) == pytest.approx(100 * sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ('targets', 'expected'), [([0, 0, 1, 1], 100.0), ([1, 1, 0, 0], 0.0), ([0, 1, 1, 0], 50.0), ([0, 0, 0, 1], 100.0)]
)
def test_auroc_of_four_samples(targets, expected):
    """All say class 0, with confidences 0.9, 0.8, 0.7, 0.6: right are those of target 0."""
    logits = of_probabilities([0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4])
    assert failure_auroc(logits, torch.tensor(targets)) == expected


def test_auroc_counts_equal_confidences_half():
    logits = of_probabilities([0.9, 0.1], [0.9, 0.1], [0.6, 0.4])
    # right: 0.9; wrong: 0.9 (half) and 0.6 (one)
    assert failure_auroc(logits, torch.tensor([0, 1, 1])) == 75.0


def test_auroc_needs_right_and_wrong():
    logits = of_probabilities([0.9, 0.1], [0.8, 0.2])
    assert failure_auroc(logits, torch.tensor([0, 0])) is None
    assert failure_auroc(logits, torch.tensor([1, 1])) is None


# Overthinking and monotonicity


def test_overthinking_of_four_samples():
    """Of target 0: lost on the way; right at main alone; right always; never right."""
    yes, no = [0.9, 0.1], [0.1, 0.9]
    logits = [of_probabilities(no, no, yes, no), of_probabilities(yes, no, yes, no), of_probabilities(no, yes, yes, no)]
    result = measure_overthinking(logits, torch.zeros(4, dtype=torch.int64))
    assert result == (25.0, 25.0, 75.0)


def test_falls_of_four_samples():
    """Largest falls, of any two classifiers in order: 0.3 by two steps, 0.06 with a rise between, 0, 0.6."""
    paths = [(0.5, 0.4, 0.2), (0.5, 0.7, 0.64), (0.1, 0.5, 0.9), (0.9, 0.3, 0.4)]
    logits = [of_probabilities(*([path[idx], 1 - path[idx]] for path in paths)) for idx in range(3)]
    falls = measure_falls(logits, torch.zeros(4, dtype=torch.int64), drops=(0.01, 0.05, 0.1, 0.2, 0.5, 0.7))
    assert falls == {0.01: 75.0, 0.05: 75.0, 0.1: 50.0, 0.2: 50.0, 0.5: 25.0, 0.7: 0.0}


def test_falls_against_a_loop_over_samples():
    logits, targets = make_logits()
    for drop, share in measure_falls(logits, targets).items():
        count = 0
        for sample, target in enumerate(targets.tolist()):
            probs = [math.exp(single[sample].double().log_softmax(-1)[target]) for single in logits]
            count += any(probs[a] - probs[b] >= drop for b in range(len(probs)) for a in range(b))
        assert share == pytest.approx(count / 2)


@pytest.mark.parametrize('measure', [measure_overthinking, measure_falls])
def test_one_target_per_sample(measure):
    logits, targets = make_logits()
    with pytest.raises(MultiExitError, match=r'targets must be \[200\], .* logits \[200, 7\], got \[199\]'):
        measure(logits, targets[1:])
