"""What a policy gives on logits that are kept."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from timm_multiexit.calibration.stage_costs import StageCosts, describe_policy
from timm_multiexit.policies.budgets import PolicyResult
from timm_multiexit.policies.leaving import assign, check_targets, walk
from timm_multiexit.policies.policy import ExitPolicy

# (classifier, whether its answer is right [N], score [N]); main has no score
Visit = tuple[int, Tensor, Tensor | None]


class PolicyMeter:
    """Measures policies on logits that are kept: what `apply_policy` and a count of its answers give, in less time.

    Scores and answers of policies that look at the exits in the same way are computed once, so a second threshold
    costs comparisons alone.

    Args:
        logits: One [N, C] tensor per classifier, main last.
        targets: Class indices [N].
        costs: What leaving costs.

    Raises:
        InvalidValueError: The logits are NaN, empty or of different shapes, or there is not one target for each sample;
            by the methods, the policy is for another number of exits.
    """

    def __init__(self, logits: Sequence[Tensor], targets: Tensor, costs: StageCosts):
        check_targets(logits, targets)
        self._logits, self._targets, self._costs = logits, targets, costs
        self._visits: dict[ExitPolicy, list[Visit]] = {}

    def visits(self, policy: ExitPolicy) -> list[Visit]:
        """Return (classifier, whether its answer is right [N], score [N]) of what the policy looks at."""
        main = len(self._logits) - 1
        policy.check_exits(main)
        is_seen = [policy.is_memoryless or idx in policy.used for idx in range(main)]
        key = replace(policy, thresholds=tuple(1.0 if seen else None for seen in is_seen))
        if key not in self._visits:
            self._visits[key] = [
                (idx, answer.argmax(-1) == self._targets, score) for idx, answer, score in walk(key, self._logits)
            ]
        return [visit for visit in self._visits[key] if visit[0] in (*policy.used, main)]

    def is_right(self, policy: ExitPolicy) -> Tensor:
        """Return which samples a policy answers right, [N] bool."""
        right = torch.zeros_like(self._targets, dtype=torch.bool)
        for _, is_right, leaves in assign(policy, self.visits(policy)):
            right |= is_right & leaves
        return right

    def measure(self, policy: ExitPolicy) -> PolicyResult:
        """Return accuracy, shares and cost of a policy."""
        counts, num_right = [0] * len(self._logits), 0
        for idx, is_right, leaves in assign(policy, self.visits(policy)):
            counts[idx] = int(leaves.sum())
            num_right += int((is_right & leaves).sum())
        return describe_policy(policy, counts, num_right, [self._costs])
