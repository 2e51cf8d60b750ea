"""Temperatures: how far the confidence of a classifier is to be scaled to be its accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_multiexit.policies.leaving import checked_data
from timm_multiexit.policies.policy import TEMPERATURES


def fit_temperatures(logits: Sequence[Tensor], targets: Tensor) -> tuple[float, ...]:
    """Return the temperature of each classifier, main last, with the smallest mean cross-entropy of logits / T.

    Between 0.01 and 100. A classifier without a mistake has none (the smaller the better) and gets 1; a sample whose
    target is masked out does not count.

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples.
        targets: [N] int64 class indices.

    Raises:
        InvalidValueError: Logits or targets are empty, NaN, of another shape or out of range.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.

    >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> [round(value, 3) for value in fit_temperatures([logits, 2 * logits], torch.tensor([0, 0, 0, 1]))]
    [0.91, 1.82]
    """
    logits, targets = checked_data(logits, targets)
    return tuple(_fit_temperature(single, targets) for single in logits)


def _fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Find where the slope of the loss, convex in 1 / T, is zero: Newton's steps, and bisection where they fail."""
    logits = logits - logits.amax(-1, keepdim=True)
    target = logits.gather(1, targets[:, None])[:, 0]
    logits, target = logits[target.isfinite()], target[target.isfinite()]
    if bool((target == 0).all()):
        return 1.0
    finite = logits.clamp(min=-1e4)  # a probability of 0 times it is 0
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    inverse = 1.0
    for _ in range(60):
        probs = (logits * inverse).softmax(-1)
        mean = (probs * finite).sum(-1)
        slope = float((mean - target).mean(dtype=torch.float64))
        curve = float(((probs * finite * finite).sum(-1) - mean**2).mean(dtype=torch.float64))
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curve if curve > 0 else low
        inverse, last = (step if low < step < high else (low * high) ** 0.5), inverse
        if abs(inverse - last) <= 1e-6 * last:
            break
    return min(max(1 / inverse, TEMPERATURES[0]), TEMPERATURES[1])
