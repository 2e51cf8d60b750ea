"""Meter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.policies.leaving import _check, walk
from timm_multiexit.policies.policy import ExitPolicy


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
