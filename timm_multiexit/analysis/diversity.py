"""Table IV: how diverse the members of a teacher are, and what the network has gained."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from timm_multiexit.utils.text import exit_names

_CHUNK = 4096  # images whose probabilities are in memory at once


def pairwise_disagreement(predictions: Tensor) -> float | None:
    """Return the share of images for which two members predict different classes, the mean over all pairs, in 0 to 1.

    None with fewer than two rows of predictions, [M, N].

    >>> pairwise_disagreement(torch.tensor([[0, 0], [0, 1], [0, 0]]))  # pairs differ by 1/2, 0 and 1/2
    0.3333333333333333
    """
    shares = [one.ne(other).double().mean().item() for one, other in combinations(predictions, 2)]
    return sum(shares) / len(shares) if shares else None


def softmax_variance(logits: Sequence[Tensor]) -> float | None:
    """Return the variance over members of the softmax probabilities, summed over classes, the mean over images.

    The variance is divided by the number of members, so it is 0 where they agree and below 1; None with fewer than two
    members, of logits [N, C] each.

    >>> softmax_variance([torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])])
    0.5
    """
    if len(logits) < 2:
        return None
    total = 0.0
    for chunk in zip(*(single.split(_CHUNK) for single in logits)):
        probabilities = torch.stack([single.double().softmax(-1) for single in chunk])  # [M, B, C]
        total += probabilities.var(0, correction=0).sum().item()
    return total / len(logits[0])


def describe_members(logits: Sequence[Tensor], targets: Tensor, members: Mapping[int, float]) -> dict[str, Any]:
    """Return the diversity of some classifiers and the top-1 of the weighted mean of their logits, in percent.

    `logits` are those of all classifiers, [N, C] each, main last; `members` are index -> weight in the mean, at least
    one.
    """
    chosen, names = [logits[idx] for idx in members], exit_names(len(logits) - 1)
    first, *rest = (weight * logits[idx] for idx, weight in members.items())
    mean = sum(rest, first)
    return {
        'members': [names[idx] for idx in members],
        'disagreement': pairwise_disagreement(torch.stack([single.argmax(-1) for single in chosen])),
        'softmax_variance': softmax_variance(chosen),
        'top1': 100 * mean.argmax(-1).eq(targets).double().mean().item(),
    }


def describe_gain(top1: Mapping[str, float], reference: Mapping[str, float] | None) -> dict[str, float | None]:
    """Return by how many points main and ensemble are better than the reference's; None if one of the two is missing.

    >>> describe_gain({'main': 71.0, 'ens': 72.5}, {'main': 70.0, 'ens': 70.5})
    {'main': 1.0, 'ens': 2.0}
    """
    return {name: top1[name] - reference[name] if reference and name in reference else None for name in ('main', 'ens')}
