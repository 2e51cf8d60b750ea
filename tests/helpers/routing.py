"""Random policies, and what a routed batch must equal."""

import torch

from timm_multiexit.policies.leaving import apply_policy, walk
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy


def draw_policy(draw, logits):
    """Return a random policy with thresholds among the scores of these logits, and the scores as {exit: [N]}."""
    criterion = draw.choice(list(CRITERIA))
    shape = {
        'temperatures': tuple(draw.uniform(0.5, 2) for _ in range(len(logits))) if draw.random() < 0.5 else (),
        'combine': draw.choice([None, 'mean', 'geometric']),
    }
    used = [draw.random() < 0.8 for _ in logits[1:]]
    probe = ExitPolicy(criterion, tuple((1 if is_used else None) for is_used in used), **shape)
    scores = {idx: score for idx, _, score in walk(probe, logits) if score is not None}
    thresholds = [None] * (len(logits) - 1)
    for idx, score in scores.items():
        if criterion == 'patience':
            thresholds[idx] = draw.choice([1, 1, 2])
        else:
            low, high = float(score.min()), float(score.max())
            thresholds[idx] = min(max(draw.uniform(low - 0.1 * (high - low), high), 0.0), 1.0)
    return ExitPolicy(criterion, tuple(thresholds), **shape), scores


def assert_equals_simulation(prediction, policy, logits, scores):
    expected = apply_policy(policy, logits)
    close = torch.zeros_like(expected.exit_idx, dtype=torch.bool)
    for idx, score in scores.items():
        close |= (score - policy.thresholds[idx]).abs() < 1e-5
    close &= policy.criterion != 'patience'
    assert torch.equal(prediction.exit_idx[~close], expected.exit_idx[~close])
    torch.testing.assert_close(prediction.logits[~close], expected.logits[~close], rtol=1e-5, atol=1e-5)
    return expected
