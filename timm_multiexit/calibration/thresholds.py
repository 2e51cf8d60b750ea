"""Calibration on held-out logits: temperatures, thresholds for a budget, thresholds for a bounded drop in accuracy."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from timm_multiexit.calibration.bounded_drop import find_path, last_safe, measure_drops
from timm_multiexit.calibration.candidates import Candidates, list_used_sets, rank_scores, split_geometrically
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts, checked_costs, describe_policy
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.exits.cost import ExitCost
from timm_multiexit.policies.budgets import BudgetTable, PolicyResult, parse_budget
from timm_multiexit.policies.leaving import checked_data
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_number
from timm_multiexit.utils.environment import on_cpu
from timm_multiexit.utils.errors import InvalidValueError, brief

_DELTA = 0.1
_NUM_BUDGETS = 100  # that policies are picked for, beside those of the field's solver


def calibrate(
    logits: Sequence[Tensor],
    targets: Tensor,
    costs: StageCosts | Sequence[ExitCost],
    *,
    budget: str | None = None,
    max_drop: float | None = None,
    delta: float | None = None,
    criterion: str = 'confidence',
    combine: str | None = None,
) -> ExitPolicy:
    """Return a policy: the most accurate within a budget, or the cheapest with a guarantee.

    Temperatures are fitted; the policy has none where one without is better (see `search_budgets`).

    With `max_drop`, the true accuracy is less than main's by at most that with probability 1 - `delta` over the draw
    of the held-out samples (see `timm_multiexit.calibration.bounded_drop`). One half of them, drawn with a fixed seed,
    gives policies from careful to cheap, the other half tests them. A policy that uses no exit is always safe and is
    returned with a warning where no other passes; about 1.1 log(1 / delta) / max_drop tested samples are needed.

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples, independent of each other.
        targets: [N] int64 class indices.
        costs: `model.cost()`, or what leaving costs in any unit.
        budget: Mean cost per image: '60%' of main's cost, '1.2GMACs', or '5ms' with costs in ms.
        max_drop: Share of the samples, in (0, 1): 0.01 is one point of accuracy.
        delta: Probability that the drop is larger, in (0, 1), 0.1 if not given; of `max_drop` alone.
        criterion: Key of `timm_multiexit.policies.policy.CRITERIA`.
        combine: As in `ExitPolicy`.

    Raises:
        InvalidTypeError: An argument is of the wrong type.
        InvalidValueError: Not one of `budget` and `max_drop`; a budget that cannot be met; a number out of range;
            logits or targets that are empty, NaN or of another shape; costs of another number of exits.

    >>> early, main = torch.tensor([[4.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    >>> costs = StageCosts(paths=(40, 100), heads=(2,))
    >>> calibrate([early, main], torch.tensor([0, 1]), costs, budget='80%').used
    (0,)
    """
    check_wishes(budget, max_drop, delta, criterion, combine)
    logits, targets = checked_data(logits, targets)
    costs = checked_costs(costs, len(logits) - 1)
    with on_cpu():
        if budget is None:
            delta = _DELTA if delta is None else delta
            return _calibrate_drop(logits, targets, costs, max_drop, delta, criterion=criterion, combine=combine)
        temperatures = fit_temperatures(logits, targets)
        table = search_budgets(logits, targets, costs, criterion=criterion, temperatures=temperatures, combine=combine)
        return table.select(budget).policy


def check_wishes(budget: Any, max_drop: Any, delta: Any, criterion: Any, combine: Any) -> bool:
    """Return whether the budget is a time; raise where a policy cannot be chosen by these arguments of `calibrate`."""
    if (budget is None) == (max_drop is None):
        raise InvalidValueError(
            'Pass either budget, as budget="60%", or max_drop, as max_drop=0.01, got'
            f' budget={brief(budget)} and max_drop={brief(max_drop)}.'
        )
    ExitPolicy(criterion, combine=combine)
    if budget is None:
        check_number('max_drop', max_drop, 0, 1, is_open=True, hint='0.01 is one percent.')
    elif delta is not None:
        raise InvalidValueError(f'delta goes with max_drop, not with a budget, got {brief(delta)}: leave it out.')
    if delta is not None:
        check_number('delta', delta, 0, 1, is_open=True, hint='0.01 is one percent.')
    return budget is not None and parse_budget(budget).unit == 'ms'


def _calibrate_drop(
    logits: Sequence[Tensor],
    targets: Tensor,
    costs: StageCosts,
    max_drop: Any,
    delta: float,
    *,
    criterion: str,
    combine: str | None,
) -> ExitPolicy:
    if len(targets) < 2:
        raise InvalidValueError('max_drop needs 2 or more held-out samples, some to choose and others to test, got 1.')
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    halves = [([single[rows] for single in logits], targets[rows]) for rows in order.tensor_split([len(order) // 2])]
    temperatures = fit_temperatures(*halves[0])
    table = search_budgets(*halves[0], costs, criterion=criterion, temperatures=temperatures, combine=combine)
    path = find_path([point.policy for point in reversed(table.points)], halves[0][0])
    chosen_on, tested_on = (PolicyMeter(*half, costs) for half in halves)
    num_safe = last_safe(measure_drops(path, chosen_on, tested_on), max_drop, delta) + 1
    # All that passed are safe, those at the start of the path may cost more than they save.
    careful = ExitPolicy(criterion, (None,) * len(costs.heads), temperatures, combine)
    prices = {policy: chosen_on.measure(policy).cost(costs.unit) for policy in path[:num_safe]} | {careful: costs.total}
    policy = min([careful, *path[:num_safe]], key=lambda policy: prices[policy] or 0.0)
    if policy is careful:
        warnings.warn(
            f'No policy that uses an exit is safe with max_drop {max_drop} and delta {delta} on {len(targets)} samples,'
            ' so no exit is used: calibrate on more samples or allow a larger drop.',
            stacklevel=3,
        )
    return policy


@on_cpu()
def solve_budgeted_batch(
    logits: Sequence[Tensor],
    targets: Tensor,
    costs: StageCosts | Sequence[ExitCost],
    *,
    temperatures: tuple[float, ...] = (),
) -> tuple[PolicyResult, ...]:
    """Return the 39 policies of the field's protocol, "budgeted batch classification", with confidence thresholds.

    With r = p / 20, p = 1 .. 39, a share proportional to r^k of the samples is to leave at classifier k = 1 .. K: the
    threshold of exit k is the confidence of the floor(N * share)-th most confident sample that has not left, and all
    that are as confident leave. An exit whose share is less than a sample, or more than are left, is not used.

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples.
        targets: [N] int64 class indices.
        costs: `model.cost()`, or what leaving costs in any unit.
        temperatures: One per classifier, or none.

    Raises:
        InvalidValueError: Logits or targets are empty, NaN, of another shape or out of range; costs of another number
            of exits.

    Source: Huang et al., MSDNet, 2018, section 5.2; kalviny/MSDNet-PyTorch: adaptive_inference.py, which leaves an
        unused exit running.
    """
    logits, targets = checked_data(logits, targets)
    costs = checked_costs(costs, len(logits) - 1)
    meter = PolicyMeter(logits, targets, costs)
    visits = meter.visits(ExitPolicy('confidence', (1.0,) * len(costs.heads), temperatures))
    ranked = [rank_scores(score) for _, _, score in visits if score is not None]
    results = []
    for cuts in split_geometrically(torch.stack([ranks for _, ranks in ranked])).tolist():
        thresholds = tuple(float(values[cut - 1]) if cut > 0 else None for (values, _), cut in zip(ranked, cuts))
        results.append(meter.measure(ExitPolicy('confidence', thresholds, temperatures)))
    return tuple(results)


@on_cpu()
def search_budgets(
    logits: Sequence[Tensor],
    targets: Tensor,
    costs: StageCosts | Sequence[ExitCost],
    *,
    criterion: str = 'confidence',
    temperatures: tuple[float, ...] = (),
    combine: str | None = None,
    times: StageCosts | None = None,
    measured_on: str | None = None,
) -> BudgetTable:
    """Return policies for all budgets, searched for on held-out logits.

    At the mean cost of each of the field's 39 policies the table has one that is as accurate or more on these logits:
    for confidence without `combine` those of `solve_budgeted_batch`, for others their kin with the same criterion and
    `combine`, which the field's may surpass. With temperatures, the 39 without any set the floor as well as those
    with them and are in the table where they are needed, for temperatures change who is surest. Among all that are as
    accurate, the one with most right answers expected is taken: expectations overfit less than counts (see
    `timm_multiexit.calibration.candidates`).

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples.
        targets: [N] int64 class indices.
        costs: `model.cost()`, or what leaving costs in any unit.
        criterion: Key of `timm_multiexit.policies.policy.CRITERIA`.
        temperatures: One per classifier, or none.
        combine: As in `ExitPolicy`.
        times: What leaving costs in ms, for budgets in ms too, where `costs` are in MACs.
        measured_on: Hardware and batch size of the times.

    Raises:
        InvalidValueError: Logits or targets are empty, NaN, of another shape or out of range; costs of another number
            of exits; `times` in another unit than ms or beside `costs` in ms.
    """
    logits, targets = checked_data(logits, targets)
    all_costs = [checked_costs(costs, len(logits) - 1)]
    if times is not None:
        all_costs.append(checked_costs(times, len(logits) - 1))
        if [each.unit for each in all_costs] != ['MACs', 'ms']:
            raise InvalidValueError(
                f'costs must be in MACs and times in ms, got {all_costs[0].unit} and {times.unit}. Pass times alone as'
                ' costs.'
            )
    base = ExitPolicy(criterion, (None,) * len(all_costs[0].heads), temperatures, combine)
    sets = [Candidates(base, used, logits, targets) for used in list_used_sets(base)]
    if temperatures and criterion != 'patience':
        sets.append(sets[-1].without_temperatures(logits, targets))
    points: dict[ExitPolicy, PolicyResult] = {}
    for each in all_costs:
        for policy, counts, right in _search(sets, each):
            points.setdefault(policy, describe_policy(policy, counts, right, all_costs))
    unit = all_costs[0].unit
    totals = {f'total_{each.unit.lower()}': each.total for each in all_costs}
    totals |= {f'max_{each.unit.lower()}': each.largest for each in all_costs}
    ordered = sorted(points.values(), key=lambda point: (point.cost(unit), point.accuracy))
    return BudgetTable(tuple(ordered), **totals, measured_on=measured_on)


def _search(sets: Sequence[Candidates], costs: StageCosts) -> Iterator[tuple[ExitPolicy, list[int], int]]:
    """Yield the policies of a table for costs of one unit, with how many leave where and right answers."""
    found = [each.search(costs) for each in sets]
    right, expected, cost, is_field = (torch.cat(part) for part in zip(*(each[2:] for each in found)))
    places = [(idx, row) for idx, each in enumerate(found) for row in range(len(each[0]))]
    for place in _pick(right, expected, cost, is_field):
        idx, row = places[place]
        yield sets[idx].to_policy(found[idx][0][row]), found[idx][1][row].tolist(), int(right[place])


def _pick(right: Tensor, expected: Tensor, cost: Tensor, is_field: Tensor) -> list[int]:
    """Return places of policies for many budgets, cheapest first, right answers never falling.

    Each has most right answers expected of those within a budget that are right as often as the field's or more, and
    worse than what was picked for a larger budget: right less often, or as often with fewer expected. To take whatever
    is luckiest on these samples overfits; so does to take the cheapest of those that few samples cannot tell apart.
    """
    steps = torch.linspace(float(cost.min()), float(cost.max()), _NUM_BUDGETS, dtype=torch.float64)
    chosen: list[int] = []
    for budget in torch.cat([cost[is_field], steps]).clamp(min=cost.min()).sort(descending=True).values:
        within = cost <= budget
        if chosen and within[chosen[-1]]:
            continue
        floor = torch.where(within & is_field, right, -1).max()
        allowed = within & (right >= floor)
        while chosen and not (allowed & _is_worse(right, expected, chosen[-1])).any():
            chosen.pop()
        if chosen:
            allowed &= _is_worse(right, expected, chosen[-1])
        # Of equals the cheapest.
        chosen.append(int(torch.where(allowed, expected - 1e-6 * cost, -torch.inf).argmax()))
    return chosen[::-1]


def _is_worse(right: Tensor, expected: Tensor, place: int) -> Tensor:
    """Return which policies are right less often than the one at a place, or as often with fewer expected, [P] bool."""
    return (right < right[place]) | ((right == right[place]) & (expected < expected[place]))
