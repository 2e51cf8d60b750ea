"""Metrics of dynamic inference, from the logits of all classifiers on a whole data set."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_multiexit.budgets import StageCosts
from timm_multiexit.config import MultiExitError
from timm_multiexit.metrics import ExitEvaluator
from timm_multiexit.policy import CRITERIA, ExitPolicy, check_logits, walk

DROPS = (0.01, 0.05, 0.1, 0.2, 0.5)


class PolicyResult(NamedTuple):
    """What a policy does on a data set.

    Attributes:
        policy: The policy.
        accuracy: Top-1 in percent.
        shares: Share of the samples that leaves at each classifier, main last; they sum up to 1.
        cost: Mean per image, in the unit of the costs.
    """

    policy: ExitPolicy
    accuracy: float
    shares: tuple[float, ...]
    cost: float


class PolicyMeter:
    """Measures policies on logits that are kept: what `apply_policy` and a count of its answers give, in less time.

    Scores and answers of policies that use the same exits in the same way are computed once, so a second threshold
    costs comparisons alone.

    Args:
        logits: One [N, C] tensor per classifier, main last.
        targets: Class indices [N].
        costs: What leaving costs.

    Raises:
        MultiExitError: The logits are NaN, empty or of different shapes, or there is not one target for each sample.
    """

    def __init__(self, logits: Sequence[Tensor], targets: Tensor, costs: StageCosts):
        _check(logits, targets)
        self._logits, self._targets, self._costs = logits, targets, costs
        self._walks: dict[tuple, list[tuple[int, Tensor, Tensor | None]]] = {}

    def _walk(self, policy: ExitPolicy) -> list[tuple[int, Tensor, Tensor | None]]:
        """Return (classifier, whether its answer is right [N], score [N]) of what the policy looks at."""
        key = (policy.criterion, policy.temperatures, policy.combine, policy.used)
        if key not in self._walks:
            self._walks[key] = [
                (idx, answer.argmax(-1) == self._targets, score) for idx, answer, score in walk(policy, self._logits)
            ]
        return self._walks[key]

    def measure(self, policy: ExitPolicy) -> PolicyResult:
        """Return accuracy, shares and cost of a policy.

        Raises:
            MultiExitError: The policy is for another number of exits.
        """
        policy.check_exits(len(self._logits) - 1)
        exit_idx = torch.full_like(self._targets, -1)
        num_right = 0
        for idx, is_right, score in self._walk(policy):
            leaves = exit_idx < 0
            if score is not None:
                leaves &= policy.leaves(idx, score)
            exit_idx[leaves] = idx
            num_right += int(is_right[leaves].sum())
        counts = exit_idx.bincount(minlength=len(self._logits))
        return PolicyResult(
            policy=policy,
            accuracy=100 * num_right / len(exit_idx),
            shares=tuple((counts.double() / len(exit_idx)).tolist()),
            cost=self._costs.mean(policy, exit_idx),
        )


def failure_auroc(logits: Tensor, targets: Tensor) -> float | None:
    """Return how well confidence tells right from wrong, in percent: 50 is chance, 100 is perfect order.

    It is the chance that a sample that is right has a larger maximum of its probabilities than one that is wrong;
    equal ones count half.

    Args:
        logits: [N, C] of one classifier.
        targets: Class indices [N].

    Returns:
        None where all samples are right, or all are wrong.

    Source: Hendrycks and Gimpel, A Baseline for Detecting Misclassified Examples, 2017, section 3 (AUROC).

    >>> failure_auroc(torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    100.0
    """
    is_right = logits.argmax(-1) == targets
    num_right = int(is_right.sum())
    num_wrong = len(targets) - num_right
    if not num_right or not num_wrong:
        return None
    confidence = CRITERIA['confidence'].score(logits.float())
    _, group, counts = confidence.unique(return_inverse=True, return_counts=True)
    mean_ranks = counts.cumsum(0).double() - (counts - 1) / 2  # from 1, the mean where several are equal
    total = float(mean_ranks[group[is_right]].sum())
    return 100 * (total - num_right * (num_right + 1) / 2) / (num_right * num_wrong)


class Overthinking(NamedTuple):
    """What main loses of what exits know, in percent of all samples.

    Attributes:
        lost: Right at some exit and wrong at main.
        gained: Right at main and wrong at every exit.
        right_somewhere: Right at main or at some exit: what the best choice of the exit for each sample would reach.
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
    _check(logits, targets)
    is_right = torch.stack([single.argmax(-1) == targets for single in logits])  # [K, N]
    early, main = is_right[:-1].any(0), is_right[-1]
    percent = 100 / len(targets)
    return Overthinking(
        lost=float((early & ~main).sum()) * percent,
        gained=float((main & ~early).sum()) * percent,
        right_somewhere=float((early | main).sum()) * percent,
    )


def measure_falls(logits: Sequence[Tensor], targets: Tensor, drops: Sequence[float] = DROPS) -> dict[float, float]:
    """Return for each drop the percentage of samples whose true class loses so much probability on the way.

    Args:
        logits: One [N, C] tensor per classifier, main last.
        targets: Class indices [N].
        drops: Falls of the probability, 0 to 1: a sample counts if from some classifier to a deeper one, not only the
            next, the probability of its true class falls by at least so much.

    Source: Jazbec et al., Towards Anytime Classification in Early-Exit Architectures by Enforcing Conditional
    Monotonicity, 2023, section 3.
    """
    _check(logits, targets)
    # Of logits less their logsumexp, so that nothing of the logits' size is allocated.
    truth = [single.float().gather(1, targets[:, None])[:, 0].double() for single in logits]
    probs = torch.stack([true - single.float().logsumexp(-1) for true, single in zip(truth, logits)]).exp()  # [K, N]
    falls = (probs.cummax(0).values - probs).amax(0)
    return {drop: 100 * float((falls >= drop).double().mean()) for drop in drops}


def _check(logits: Sequence[Tensor], targets: Tensor) -> None:
    check_logits(logits)
    if targets.shape != logits[-1].shape[:1]:
        raise MultiExitError(
            f'Targets have the shape {list(targets.shape)} for logits {list(logits[-1].shape)}, allowed is one class'
            ' index per sample.'
        )


def evaluate_logits(
    logits: Sequence[Tensor],
    targets: Tensor,
    batch_size: int = 256,
) -> dict[str, dict[str, float]]:
    """Return the metrics that `ExitEvaluator` gives for these logits.

    Args:
        logits: One [N, C] tensor per classifier, main last.
        targets: Class indices [N].
        batch_size: Samples that are looked at at a time.
    """
    evaluator = ExitEvaluator(len(logits) - 1)
    for target, *batch in zip(*(part.split(batch_size) for part in (targets, *logits))):
        evaluator.update(batch, target)
    return evaluator.compute()
