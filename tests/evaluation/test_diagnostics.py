"""Metrics of dynamic inference against hand-worked numbers and slow loops over samples."""

import math

import pytest
import torch

from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.evaluation.diagnostics import failure_auroc, measure_falls, measure_overthinking
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError

COSTS = StageCosts(paths=(10, 20, 40), heads=(3, 2))


def of_probabilities(*rows):
    """Return float64 logits whose softmax is these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def make_logits(num=200, num_classes=7, num_exits=3):
    """Return logits that agree with the targets more and more, and targets."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(num_classes, (num,), generator=generator)
    truth = torch.nn.functional.one_hot(targets, num_classes).float()
    logits = [
        torch.randn(num, num_classes, generator=generator) * 1.5 + idx * 1.2 * truth for idx in range(num_exits + 1)
    ]
    return logits, targets


# PolicyMeter


def test_policy_of_three_samples_by_hand():
    """One leaves at each classifier; the second is wrong. Exits used: both, so leaving costs 13, 25 and 45."""
    first = of_probabilities([0.9, 0.1], [0.6, 0.4], [0.5, 0.5])
    second = of_probabilities([0.5, 0.5], [0.2, 0.8], [0.3, 0.7])
    main = of_probabilities([0.1, 0.9], [0.9, 0.1], [0.1, 0.9])
    meter = PolicyMeter([first, second, main], torch.tensor([0, 0, 1]), COSTS)
    result = meter.measure(ExitPolicy('confidence', (0.85, 0.75)))
    assert result.accuracy == pytest.approx(200 / 3)
    assert result.shares == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert result.macs == pytest.approx((13 + 25 + 45) / 3)


def test_exit_that_is_not_used_is_not_charged():
    logits = [of_probabilities([0.9, 0.1])] * 3
    result = PolicyMeter(logits, torch.tensor([0]), COSTS).measure(ExitPolicy('confidence', (None, 0.8)))
    assert result.shares == (0.0, 1.0, 0.0)
    assert result.macs == 22


POLICIES = [
    ExitPolicy('confidence', (0.5, 0.6, 0.7)),
    ExitPolicy('confidence', (0.4, 0.8, 0.3)),
    ExitPolicy('confidence', (None, 0.6, None), (2.0, 1.0, 0.5, 3.0)),
    ExitPolicy('entropy', (0.5, 0.4, 0.9)),
    ExitPolicy('margin', (0.3, None, 0.2), combine='mean'),
    ExitPolicy('margin', (0.3, 0.1, 0.2), combine='geometric'),
    ExitPolicy('patience', (1, 1, 2)),
    ExitPolicy('patience', (1, None, 1)),
    ExitPolicy('confidence', (None, None, None)),
]


def test_meter_gives_what_the_simulation_gives():
    """One meter for all, so that what it keeps for one policy must not leak into another."""
    logits, targets = make_logits()
    costs = StageCosts(paths=(10, 20, 30, 40), heads=(3, 2, 1))
    meter = PolicyMeter(logits, targets, costs)
    for policy in [*POLICIES, *reversed(POLICIES)]:
        result, simulated = meter.measure(policy), apply_policy(policy, logits)
        right = spent = 0
        for answer, target, idx in zip(simulated.logits, targets, simulated.exit_idx.tolist()):
            right += int(answer.argmax() == target)
            heads = sum(costs.heads[used] for used in policy.used if used <= idx)
            spent += costs.paths[idx] + heads
        assert result.accuracy == pytest.approx(100 * right / 200)
        assert result.macs == pytest.approx(spent / 200)
        assert result.shares == pytest.approx([(simulated.exit_idx == idx).sum().item() / 200 for idx in range(4)])


def test_meter_refuses_a_policy_of_other_exits():
    logits, targets = make_logits()
    meter = PolicyMeter(logits, targets, StageCosts((1, 2, 3, 4), (1, 1, 1)))
    with pytest.raises(MultiExitError, match='each of the 3 exits of the model, got 2'):
        meter.measure(ExitPolicy('confidence', (0.5, 0.5)))


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
