"""Logits of easy and hard samples, what leaving costs, and policies simulated on them."""

import torch

from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.policies.leaving import apply_policy

COSTS = StageCosts((25, 50, 75, 100), (3, 2, 2))


def make_samples(num, *, classes=20, quality=(1.2, 1.8, 2.4, 3.0), scale=1.0, seed=0):
    """Return logits whose noise classifiers share in part, of samples that are easy or hard for all of them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (num,), generator=generator)
    ease, shared = torch.randn(num, generator=generator), torch.randn(num, classes, generator=generator)
    logits = []
    for value in quality:
        single = 0.7 * shared + 0.7 * torch.randn(num, classes, generator=generator)
        single[torch.arange(num), targets] += 2 * value + 1.5 * ease
        logits.append(scale * single)
    return logits, targets


def simulate(policy, logits, targets, costs=COSTS):
    """Return accuracy in percent, mean cost and shares, by the rule that inference follows."""
    prediction = apply_policy(policy, logits)
    right = int((prediction.logits.argmax(-1) == targets).sum())
    shares = torch.bincount(prediction.exit_idx, minlength=len(logits)).double() / len(targets)
    return 100 * right / len(targets), costs.mean(policy, prediction.exit_idx), tuple(shares.tolist())
