"""What leaving costs, in MACs or in measured milliseconds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from timm_multiexit.exits.cost import ExitCost, add_heads
from timm_multiexit.exits.taps import RunHead, Taps
from timm_multiexit.policies.budgets import SIZES, UNITS, BudgetTable, PolicyResult
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_choice, check_instance, is_list
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, brief, is_number
from timm_multiexit.utils.timing import read_wall_clock, time_interleaved


@dataclass(frozen=True)
class StageCosts:
    """What leaving costs, per image.

    Attributes:
        paths: Cost of the backbone up to each tap, and of all of it last; one more than `heads`.
        heads: Cost of each head.
        unit: 'MACs' or 'ms'.

    Raises:
        InvalidTypeError: Costs are not lists.
        InvalidValueError: Unknown unit, numbers that are negative or not finite, a backbone that costs nothing, or
            lengths that do not fit.

    >>> costs = StageCosts(paths=(10, 20, 40), heads=(3, 2))
    >>> costs.leaving(used=(0, 1)), costs.leaving(used=(1,))
    ((13.0, 25.0, 45.0), (10.0, 22.0, 42.0))
    """

    paths: tuple[float, ...]
    heads: tuple[float, ...]
    unit: str = 'MACs'

    def __post_init__(self) -> None:
        check_choice('unit', self.unit, UNITS)
        for name in ('paths', 'heads'):
            if not is_list(getattr(self, name)):
                raise InvalidTypeError(f'{name} must be a list of numbers, got {brief(getattr(self, name))}.')
            values = tuple(getattr(self, name))
            wrong = [value for value in values if not is_number(value) or not 0 <= value <= SIZES[1]]
            if wrong:
                raise InvalidValueError(f'The costs of {name} must be in [0, 1e18], got {brief(wrong[0])}.')
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if len(self.paths) != len(self.heads) + 1:
            raise InvalidValueError(
                'paths must have one cost per head and that of the whole backbone, got'
                f' {len(self.paths)} paths with {len(self.heads)} heads.'
            )
        if self.paths[-1] <= 0:
            raise InvalidValueError(f'The cost of the backbone must be > 0, got {self.paths[-1]} {self.unit}.')

    @classmethod
    def from_exit_costs(cls, costs: Sequence[ExitCost]) -> 'StageCosts':
        """Return the costs in MACs of `model.cost()`: one per classifier, main last."""
        paths = tuple(cost.fixed.macs - cost.head.macs for cost in costs)
        return cls(paths, tuple(cost.head.macs for cost in costs[:-1]))

    @property
    def total(self) -> float:
        """Cost of main alone: all of the backbone, no heads."""
        return self.paths[-1]

    @property
    def largest(self) -> float:
        """Cost of main with all heads on the way: the most that a policy can spend on an image."""
        return self.paths[-1] + sum(self.heads)

    def check_budget(self, budget: str) -> None:
        """Check that a policy can meet a budget: from always the first exit to main with all heads on the way.

        Args:
            budget: As `parse_budget` reads it, in this unit or a share of main's cost.

        Raises:
            InvalidValueError: No policy can, or it is in another unit.
        """
        lowest = min([*(path + head for path, head in zip(self.paths, self.heads)), self.total])
        unused, shares = ExitPolicy('confidence', (None,) * len(self.heads)), (0.0,) * len(self.heads) + (1.0,)
        if self.unit == 'MACs':
            point = PolicyResult(unused, 0.0, shares, macs=lowest)
            table = BudgetTable((point,), total_macs=self.total, max_macs=self.largest)
        else:
            point = PolicyResult(unused, 0.0, shares, ms=lowest)
            table = BudgetTable((point,), total_ms=self.total, max_ms=self.largest)
        table.select(budget)

    def leaving(self, used: Sequence[int]) -> tuple[float, ...]:
        """Return the cost of leaving at each classifier, main last; exits not used are neither run nor charged."""
        return tuple(add_heads(self.paths, self.heads, used))

    def average(self, used: Sequence[int], counts: Sequence[float]) -> float:
        """Return the mean cost per image, by how many (or what share) leave at each classifier, main last."""
        return sum(cost * count for cost, count in zip(self.leaving(used), counts)) / sum(counts)

    def mean(self, policy: ExitPolicy, exit_idx: Tensor) -> float:
        """Return the mean cost per image of a policy, by where each image left, [N] int64 (`Prediction.exit_idx`).

        Raises:
            InvalidTypeError: It is not an `ExitPolicy`.
            InvalidValueError: The policy is for another number of exits, or there are no images, or indices out of
                range.
        """
        check_instance('policy', policy, ExitPolicy)
        policy.check_exits(len(self.heads))
        is_index = isinstance(exit_idx, Tensor) and exit_idx.ndim == 1 and not exit_idx.dtype.is_floating_point
        if not is_index or not len(exit_idx) or not 0 <= int(exit_idx.min()) <= int(exit_idx.max()) < len(self.paths):
            raise InvalidValueError(
                f'exit_idx must be one integer in [0, {len(self.heads)}] per image, got {brief(exit_idx)}. Pass'
                ' prediction.exit_idx.'
            )
        return self.average(policy.used, torch.bincount(exit_idx.cpu(), minlength=len(self.paths)).tolist())

    def averages(self, is_used: Tensor, counts: Tensor) -> Tensor:
        """Return `average` of many policies, [P] float64, by used exits [P, E] bool and counts [P, E + 1] int64."""
        paths, heads = (torch.tensor(costs, dtype=torch.float64) for costs in (self.paths, self.heads))
        spent = torch.nn.functional.pad(heads * is_used, (0, 1)).cumsum(1)  # [P, E + 1]
        return ((paths + spent) * counts).sum(1) / counts.sum(1)

    def relative(self, used: Sequence[int]) -> 'StageCosts':
        """Return the costs of some exits and main alone, as shares of main's."""
        paths = tuple(self.paths[idx] / self.total for idx in (*used, -1))
        return StageCosts(paths, tuple(self.heads[idx] / self.total for idx in used), self.unit)


def describe_policy(
    policy: ExitPolicy, counts: Sequence[int], num_right: int, costs: Sequence[StageCosts]
) -> PolicyResult:
    """Return what a policy gives where `counts` samples leave at each classifier, main last, for costs in each unit."""
    num = sum(counts)
    means = {each.unit.lower(): each.average(policy.used, counts) for each in costs}
    return PolicyResult(policy, 100 * num_right / num, tuple(count / num for count in counts), **means)


def adapt_budgets(table: BudgetTable, costs: StageCosts) -> BudgetTable:
    """Return a table of budgets for images of another size: MACs at `costs`, while images leave where they did.

    Its times are dropped, for they are not known. A table of these costs already, or of times alone, stays as it is.
    """
    if table.total_macs in (None, costs.total):
        return table
    points = [replace(point, macs=costs.average(point.policy.used, point.shares), ms=None) for point in table.points]
    ranked = sorted(points, key=lambda point: point.macs or 0.0)
    return BudgetTable(tuple(ranked), total_macs=costs.total, max_macs=costs.largest)


def checked_costs(costs: StageCosts | Sequence[ExitCost], num_exits: int) -> StageCosts:
    """Return the costs as `StageCosts`; raise `InvalidValueError` unless they are of so many exits."""
    if not isinstance(costs, StageCosts):
        if not is_list(costs) or not all(isinstance(cost, ExitCost) for cost in costs):
            raise InvalidTypeError(f'costs must be StageCosts or model.cost(), got {brief(costs)}.')
        costs = StageCosts.from_exit_costs(costs)
    if len(costs.heads) != num_exits:
        raise InvalidValueError(
            f'costs must be those of the {num_exits} exits that the logits are of, and of main, got'
            f' {len(costs.heads)} exits.'
        )
    return costs


@torch.no_grad()
def measure_stages(
    backbone: nn.Module, taps: Taps, images: Tensor, *, run_head: RunHead, rounds: int = 10
) -> StageCosts:
    """Return the medians of the times to each tap and of each head, in milliseconds per image of a batch [B, C, H, W].

    The turns of the parts interleave, so that a busy machine slows all alike.
    """
    tensors = [taps.stop(backbone, images, idx) for idx in range(len(taps.names))]
    variants: dict[str, Callable[[], object]] = {'main': partial(backbone, images)}
    for idx, tensor in enumerate(tensors):
        variants[f'path {idx}'] = partial(taps.stop, backbone, images, idx)
        variants[f'head {idx}'] = partial(run_head, idx, tensor)
    times = time_interleaved(variants, rounds, images.device, clock=read_wall_clock)
    ms = {name: 1e3 * statistics.median(seconds) / len(images) for name, seconds in times.items()}
    # A deeper tap is never sooner; measured, it may be by the noise.
    paths = accumulate([*(ms[f'path {idx}'] for idx in range(len(tensors))), ms['main']], max)
    return StageCosts(tuple(paths), tuple(ms[f'head {idx}'] for idx in range(len(tensors))), 'ms')


def describe_times(images: Tensor) -> str:
    """Return what times of a batch must be stamped with: hardware, device and batch size."""
    return f'{describe_environment()["hardware"]}, {images.device}, batch of {len(images)}'
