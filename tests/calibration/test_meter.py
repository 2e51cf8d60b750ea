"""Policies measured on kept logits, against hand-worked numbers and a loop over samples."""

import pytest
import torch
from helpers.logits import make_logits, of_probabilities

from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError

COSTS = StageCosts(paths=(10, 20, 40), heads=(3, 2))


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
