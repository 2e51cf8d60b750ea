"""How well exits know when they are right, and what deeper classifiers lose, from the logits of a whole data set."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_multiexit.policies.leaving import check_targets

DROPS = (0.01, 0.05, 0.1, 0.2, 0.5)


def failure_auroc(logits: Tensor, targets: Tensor) -> float | None:
    """Return how well confidence separates right from wrong predictions, in percent: 50 is chance, 100 is perfect.

    It is the probability that a correctly classified sample has a larger maximum probability than a misclassified
    one; ties count half.

    Args:
        logits: [N, C] of one classifier.
        targets: Class indices [N].

    Returns:
        None if all samples are right, or all are wrong.

    Source: Hendrycks and Gimpel, A Baseline for Detecting Misclassified Examples, 2017, section 3 (AUROC).

    >>> failure_auroc(torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    100.0
    """
    is_right = logits.argmax(-1) == targets
    num_right = int(is_right.sum())
    num_wrong = len(targets) - num_right
    if not num_right or not num_wrong:
        return None
    confidence = logits.float().softmax(-1).amax(-1)
    _, group, counts = confidence.unique(return_inverse=True, return_counts=True)
    mean_ranks = counts.cumsum(0).double() - (counts - 1) / 2  # from 1, the mean where several are equal
    total = float(mean_ranks[group[is_right]].sum())
    return 100 * (total - num_right * (num_right + 1) / 2) / (num_right * num_wrong)


class Overthinking(NamedTuple):
    """How often exits and main disagree about the right class, in percent of all samples.

    Attributes:
        lost: Right at some exit and wrong at main.
        gained: Right at main and wrong at every exit.
        right_somewhere: Right at main or at some exit: the accuracy of the best exit for each sample.
    """

    lost: float
    gained: float
    right_somewhere: float


def measure_overthinking(logits: Sequence[Tensor], targets: Tensor) -> Overthinking:
    """Return how often an exit is right where main is not.

    Args:
        logits: One [N, C] tensor per classifier, main last.
        targets: Class indices [N].

    Source: Kaya et al., Shallow-Deep Networks: Understanding and Mitigating Network Overthinking, 2019.

    >>> early, main = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> measure_overthinking([early, main], torch.tensor([0, 0]))
    Overthinking(lost=50.0, gained=0.0, right_somewhere=100.0)
    """
    check_targets(logits, targets)
    is_right = torch.stack([single.argmax(-1) == targets for single in logits])  # [K, N]
    early, main = is_right[:-1].any(0), is_right[-1]
    percent = 100 / len(targets)
    return Overthinking(
        lost=float((early & ~main).sum()) * percent,
        gained=float((main & ~early).sum()) * percent,
        right_somewhere=float((early | main).sum()) * percent,
    )


def measure_falls(logits: Sequence[Tensor], targets: Tensor, drops: Sequence[float] = DROPS) -> dict[float, float]:
    """Return for each drop the percentage of samples whose true class loses that much probability at deeper exits.

    A sample counts for a drop, 0 to 1, if the probability of its true class falls by at least that much from some
    classifier to any deeper one. Logits are one [N, C] tensor per classifier, main last; targets class indices [N].

    Source: Jazbec et al., Towards Anytime Classification in Early-Exit Architectures by Enforcing Conditional
    Monotonicity, 2023, section 3.
    """
    check_targets(logits, targets)
    # Logits minus their logsumexp, so that nothing of the logits' size is allocated.
    truth = [single.float().gather(1, targets[:, None])[:, 0].double() for single in logits]
    probs = torch.stack([true - single.float().logsumexp(-1) for true, single in zip(truth, logits)]).exp()  # [K, N]
    falls = (probs.cummax(0).values - probs).amax(0)
    return {drop: 100 * float((falls >= drop).double().mean()) for drop in drops}
