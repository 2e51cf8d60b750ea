"""Calibration on held-out logits: temperatures, thresholds for a budget, thresholds for a bounded drop in accuracy."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from timm_multiexit.calibration.candidates import Candidates, list_used_sets, rank_scores, split_geometrically
from timm_multiexit.calibration.stage_costs import StageCosts, _check_costs, _make_point
from timm_multiexit.exits.cost import ExitCost
from timm_multiexit.policies.budgets import BudgetPoint, BudgetTable
from timm_multiexit.policies.leaving import _check_data, walk
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError

_NUM_BUDGETS = 100  # that policies are picked for, beside those of the field's solver


def solve_budgeted_batch(
    logits: Sequence[Tensor],
    targets: Tensor,
    costs: StageCosts | Sequence[ExitCost],
    *,
    temperatures: tuple[float, ...] = (),
) -> tuple[BudgetPoint, ...]:
    """Return the 39 policies of the field's protocol, "budgeted batch classification", with confidence thresholds.

    With r = p / 20, p = 1 .. 39, a share proportional to r^k of the samples is to leave at classifier k = 1 .. K: the
    threshold of exit k is the confidence of the floor(N * share)-th most confident sample that has not left, and all
    that are as confident leave. An exit whose share is no sample, or more than are left, is not used.

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples.
        targets: [N] int64 class indices.
        costs: `model.cost()`, or what leaving costs in any unit.
        temperatures: One per classifier, or none.

    Raises:
        MultiExitError: Logits or targets are empty, NaN, of another shape or out of range; costs of another number of
            exits.

    Source: Huang et al., MSDNet, 2018, section 5.2; kalviny/MSDNet-PyTorch: adaptive_inference.py, which leaves an
        unused exit running.
    """
    logits, targets = _check_data(logits, targets)
    costs = _check_costs(costs, len(logits) - 1)
    policy = ExitPolicy('confidence', (1.0,) * len(costs.heads), temperatures)
    visited = list(walk(policy, logits))
    ranked = [rank_scores(score) for _, _, score in visited[:-1]]
    correct = [answer.argmax(-1) == targets for _, answer, _ in visited]
    points = []
    for cuts in split_geometrically(torch.stack([ranks for _, ranks in ranked])).tolist():
        thresholds = tuple(float(values[cut - 1]) if cut > 0 else None for (values, _), cut in zip(ranked, cuts))
        policy = ExitPolicy('confidence', thresholds, temperatures)
        here, counts, right = torch.ones_like(correct[0]), [], 0
        for idx, (_, _, score) in enumerate(visited):
            leaves = here if score is None else here & (ranked[idx][1] < cuts[idx])
            here = here & ~leaves
            counts.append(int(leaves.sum()))
            right += int((leaves & correct[idx]).sum())
        points.append(_make_point(policy, counts, right, [costs]))
    return tuple(points)


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
    `timm_multiexit.candidates`).

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples.
        targets: [N] int64 class indices.
        costs: `model.cost()`, or what leaving costs in any unit.
        criterion: Key of `timm_multiexit.policy.CRITERIA`.
        temperatures: One per classifier, or none.
        combine: As in `ExitPolicy`.
        times: What leaving costs in ms, for budgets in ms too, where `costs` are in MACs.
        measured_on: Hardware and batch size of the times.

    Raises:
        MultiExitError: Logits or targets are empty, NaN, of another shape or out of range; costs of another number of
            exits; `times` in another unit than ms or beside `costs` in ms.
    """
    logits, targets = _check_data(logits, targets)
    all_costs = [_check_costs(costs, len(logits) - 1)]
    if times is not None:
        all_costs.append(_check_costs(times, len(logits) - 1))
        if [each.unit for each in all_costs] != ['MACs', 'ms']:
            raise MultiExitError(
                f'Costs are in {all_costs[0].unit} and times in {times.unit}, allowed are MACs and ms: give times alone'
                ' as costs.'
            )
    base = ExitPolicy(criterion, (None,) * len(all_costs[0].heads), temperatures, combine)
    sets = [Candidates(base, used, logits, targets) for used in list_used_sets(base)]
    if temperatures and criterion != 'patience':
        sets.append(sets[-1].without_temperatures(logits, targets))
    points = {}
    for each in all_costs:
        for policy, counts, right in _search(sets, each):
            points.setdefault(policy, _make_point(policy, counts, right, all_costs))
    unit = all_costs[0].unit
    known = {each.unit.lower(): each for each in all_costs}
    totals = {f'total_{name}': each.total for name, each in known.items()}
    totals |= {f'max_{name}': each.largest for name, each in known.items()}
    ordered = sorted(points.values(), key=lambda point: (point.cost(unit), point.accuracy))
    return BudgetTable(tuple(ordered), **totals, measured_on=measured_on)


def _search(sets: Sequence[Candidates], costs: StageCosts) -> Iterator[tuple[ExitPolicy, list[int], int]]:
    """Yield the policies of a table for costs of one unit, with how many leave where and right answers."""
    found = [each.search(costs.paths, costs.heads) for each in sets]
    right, expected, cost, is_field = (torch.cat(part) for part in zip(*(each[2:] for each in found)))
    places = [(idx, row) for idx, each in enumerate(found) for row in range(len(each[0]))]
    for place in _pick(right, expected, cost, is_field):
        idx, row = places[place]
        yield sets[idx].to_policy(found[idx][0][row]), found[idx][1][row].tolist(), int(right[place])


def _pick(right: Tensor, expected: Tensor, cost: Tensor, is_field: Tensor) -> list[int]:
    """Return places of policies for many budgets, cheapest first, right answers rising.

    Each has most right answers expected of those within a budget that are right as often as the field's or more, and
    less often than what was picked for a larger budget: to take whatever is luckiest on these samples overfits.
    """
    steps = torch.linspace(float(cost.min()), float(cost.max()), _NUM_BUDGETS, dtype=torch.float64)
    chosen: list[int] = []
    for budget in torch.cat([cost[is_field], steps]).clamp(min=cost.min()).sort(descending=True).values:
        within = cost <= budget
        if chosen and within[chosen[-1]]:
            continue
        floor = torch.where(within & is_field, right, -1).max()
        allowed = within & (right >= floor)
        while chosen and not (allowed & (right < right[chosen[-1]])).any():
            chosen.pop()
        if chosen:
            allowed &= right < right[chosen[-1]]
        # Of equals the cheapest.
        chosen.append(int(torch.where(allowed, expected - 1e-6 * cost, -torch.inf).argmax()))
    return chosen[::-1]
