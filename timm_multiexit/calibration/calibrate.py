"""Calibrate."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_multiexit.calibration.bounded_drop import _drops, _find_path, last_safe
from timm_multiexit.calibration.stage_costs import StageCosts, _check_costs
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import search_budgets
from timm_multiexit.exits.cost import ExitCost
from timm_multiexit.policies.leaving import _check_data, apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError


def calibrate(
    logits: Sequence[Tensor],
    targets: Tensor,
    costs: StageCosts | Sequence[ExitCost],
    *,
    budget: str | None = None,
    max_drop: float | None = None,
    delta: float = 0.1,
    criterion: str = 'confidence',
    combine: str | None = None,
) -> ExitPolicy:
    """Return a policy: the most accurate within a budget, or the cheapest with a guarantee.

    Temperatures are fitted; the policy has none where one without is better (see `search_budgets`).

    With `max_drop`, the true accuracy is less than main's by at most that with probability 1 - `delta` over the draw
    of the held-out samples (see `timm_multiexit.risk`). One half of them, drawn with a fixed seed, gives policies from
    careful to cheap, the other half tests them. A policy that uses no exit is always safe and is returned with a
    warning where no other passes; at least log(1 / delta) / max_drop tested samples are needed, about.

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples, independent of each other.
        targets: [N] int64 class indices.
        costs: `model.cost()`, or what leaving costs in any unit.
        budget: Mean cost per image: '60%' of the plain backbone, '1.2GMACs', or '5ms' with costs in ms.
        max_drop: Share of the samples, in (0, 1): 0.01 is one point of accuracy.
        delta: Probability that the drop is larger, in (0, 1); of `max_drop`.
        criterion: Key of `timm_multiexit.policy.CRITERIA`.
        combine: As in `ExitPolicy`.

    Raises:
        MultiExitError: Not one of `budget` and `max_drop`; a budget that cannot be met; a number out of range; logits
            or targets that are empty, NaN or of another shape; costs of another number of exits.

    >>> early, main = torch.tensor([[4.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    >>> costs = StageCosts(paths=(40, 100), heads=(2,))
    >>> calibrate([early, main], torch.tensor([0, 1]), costs, budget='80%').used
    (0,)
    """
    if (budget is None) == (max_drop is None):
        raise MultiExitError(
            f'budget is {budget!r} and max_drop is {max_drop!r}, allowed is one of them: the mean cost, or the loss of'
            ' accuracy.'
        )
    logits, targets = _check_data(logits, targets)
    costs = _check_costs(costs, len(logits) - 1)
    if budget is not None:
        temperatures = fit_temperatures(logits, targets)
        table = search_budgets(logits, targets, costs, criterion=criterion, temperatures=temperatures, combine=combine)
        return table.select(budget).policy
    for name, value in (('max_drop', max_drop), ('delta', delta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise MultiExitError(f'{name} is {value!r}, allowed are shares above 0 and below 1: 0.01 is one percent.')
    if len(targets) < 2:
        raise MultiExitError('There is 1 held-out sample, max_drop needs 2 or more: some to choose, others to test.')
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    halves = [([single[rows] for single in logits], targets[rows]) for rows in order.tensor_split([len(order) // 2])]
    temperatures = fit_temperatures(*halves[0])
    table = search_budgets(*halves[0], costs, criterion=criterion, temperatures=temperatures, combine=combine)
    path = _find_path([point.policy for point in reversed(table.points)], halves[0][0])
    num_safe = last_safe(_drops(path, halves), max_drop, delta) + 1
    # All that passed are safe, those at the start of the path may cost more than they save.
    careful = ExitPolicy(criterion, (None,) * len(costs.heads), temperatures, combine)
    mean_costs = {policy: costs.mean(policy, apply_policy(policy, halves[0][0]).exit_idx) for policy in path[:num_safe]}
    policy = min([careful, *path[:num_safe]], key=lambda policy: mean_costs.get(policy, costs.total))
    if policy is careful:
        warnings.warn(
            f'No policy that uses an exit is safe with max_drop {max_drop} and delta {delta} on {len(targets)} samples:'
            ' none is used, give more samples or allow more.',
            stacklevel=2,
        )
    return policy
