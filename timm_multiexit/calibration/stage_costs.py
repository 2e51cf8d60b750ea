"""How long each part of a model takes, measured: the costs of exits in milliseconds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from timm_multiexit.exits.cost import ExitCost
from timm_multiexit.exits.taps import RunHead, Taps
from timm_multiexit.policies.budgets import _SIZES, UNITS, BudgetPoint
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import MultiExitError, brief, is_number
from timm_multiexit.utils.timing import read_wall_clock, time_interleaved


@dataclass(frozen=True)
class StageCosts:
    """What leaving costs, per image.

    Attributes:
        paths: Cost of the backbone up to each tap, and of all of it last; one more than `heads`.
        heads: Cost of each head.
        unit: 'MACs' or 'ms'.

    Raises:
        MultiExitError: Unknown unit, numbers that are negative or not finite, a backbone that costs nothing, or
            lengths that do not fit.

    >>> costs = StageCosts(paths=(10, 20, 40), heads=(3, 2))
    >>> costs.leaving(used=(0, 1)), costs.leaving(used=(1,))
    ((13.0, 25.0, 45.0), (10.0, 22.0, 42.0))
    """

    paths: tuple[float, ...]
    heads: tuple[float, ...]
    unit: str = 'MACs'

    def __post_init__(self):
        if self.unit not in UNITS:
            raise MultiExitError(f'The unit of costs is {self.unit!r}, allowed are {" and ".join(UNITS)}.')
        for name in ('paths', 'heads'):
            values = tuple(getattr(self, name))
            wrong = [value for value in values if not is_number(value) or not 0 <= value <= _SIZES[1]]
            if wrong:
                raise MultiExitError(
                    f'Costs of {name} have the value {brief(wrong[0])}, allowed are numbers from 0 to 1e18.'
                )
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if len(self.paths) != len(self.heads) + 1:
            raise MultiExitError(
                f'Costs of {len(self.paths)} paths with {len(self.heads)} heads, allowed is one path per head and that'
                ' of the whole backbone.'
            )
        if self.paths[-1] <= 0:
            raise MultiExitError(f'The backbone costs {self.paths[-1]} {self.unit}, allowed are numbers above 0.')

    @classmethod
    def from_exit_costs(cls, costs: Sequence[ExitCost]) -> 'StageCosts':
        """Return the costs in MACs.

        Args:
            costs: `model.cost()`: one per classifier, main last.
        """
        paths = tuple(cost.fixed.macs - cost.head.macs for cost in costs)
        return cls(paths, tuple(cost.head.macs for cost in costs[:-1]))

    @property
    def total(self) -> float:
        """Cost of the plain backbone, all of it."""
        return self.paths[-1]

    @property
    def largest(self) -> float:
        """Cost of main with all heads on the way: the most that a policy can spend on an image."""
        return self.paths[-1] + sum(self.heads)

    def leaving(self, used: Sequence[int]) -> tuple[float, ...]:
        """Return the cost of leaving at each classifier, main last.

        Args:
            used: The exits that a policy uses; the others are neither run nor charged.
        """
        spent, costs = 0.0, []
        for idx, path in enumerate(self.paths):
            spent += self.heads[idx] if idx in used else 0.0
            costs.append(path + spent)
        return tuple(costs)

    def mean(self, policy: ExitPolicy, exit_idx: Tensor) -> float:
        """Return the mean cost per image.

        Args:
            policy: The policy.
            exit_idx: [N] int64 tensor, where each image left (`Prediction.exit_idx`).

        Raises:
            MultiExitError: The policy is for another number of exits.
        """
        policy.check_exits(len(self.heads))
        counts = torch.bincount(exit_idx.cpu(), minlength=len(self.paths)).double()
        return float(counts @ torch.tensor(self.leaving(policy.used), dtype=torch.float64) / counts.sum())


def _make_point(policy: ExitPolicy, counts: Sequence[int], right: int, all_costs: Sequence[StageCosts]) -> BudgetPoint:
    num = sum(counts)
    known = {
        costs.unit.lower(): sum(cost * count for cost, count in zip(costs.leaving(policy.used), counts)) / num
        for costs in all_costs
    }
    return BudgetPoint(policy, 100 * right / num, tuple(count / num for count in counts), **known)


def _check_costs(costs: StageCosts | Sequence[ExitCost], num_exits: int) -> StageCosts:
    costs = costs if isinstance(costs, StageCosts) else StageCosts.from_exit_costs(costs)
    if len(costs.heads) != num_exits:
        raise MultiExitError(
            f'Costs are of {len(costs.heads)} exits, logits of {num_exits}: give one cost and one tensor of logits per'
            ' exit, and those of main.'
        )
    return costs


@torch.no_grad()
def measure_stages(
    backbone: nn.Module, taps: Taps, images: Tensor, *, run_head: RunHead, rounds: int = 10
) -> StageCosts:
    """Return the medians of the times to each tap and of each head, in milliseconds per image.

    Args:
        backbone: In eval mode.
        taps: Its taps.
        images: A batch [B, C, H, W].
        run_head: Gives an exit's logits.
        rounds: Turns of each part; they interleave, so that a busy machine slows all alike.
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
    """Return what times of a batch must be stamped with: hardware, device and batch size.

    Args:
        images: The batch [B, C, H, W] that was timed.
    """
    return f'{describe_environment()["hardware"]}, {images.device}, batch of {len(images)}'
