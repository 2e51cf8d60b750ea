"""Calibration on held-out logits: temperatures, thresholds for a budget, thresholds for a bounded drop in accuracy."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from timm_multiexit.budgets import BudgetPoint, BudgetTable, StageCosts
from timm_multiexit.candidates import Candidates, list_used_sets, rank_scores, split_geometrically
from timm_multiexit.config import MultiExitError
from timm_multiexit.cost import ExitCost
from timm_multiexit.policy import CRITERIA, TEMPERATURES, ExitPolicy, apply_policy, check_logits, walk
from timm_multiexit.risk import drop_losses, last_safe

_NUM_BUDGETS = 100  # that policies are picked for, beside those of the field's solver


def fit_temperatures(logits: Sequence[Tensor], targets: Tensor) -> tuple[float, ...]:
    """Return the temperature of each classifier, main last, with the smallest mean cross-entropy of logits / T.

    Between 0.01 and 100. A classifier without a mistake has none (the smaller the better) and gets 1; a sample whose
    target is masked out does not count.

    Args:
        logits: One [N, C] tensor per classifier, main last, of held-out samples.
        targets: [N] int64 class indices.

    Raises:
        MultiExitError: Logits or targets are empty, NaN, of another shape or out of range.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.

    >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> [round(value, 3) for value in fit_temperatures([logits, 2 * logits], torch.tensor([0, 0, 0, 1]))]
    [0.91, 1.82]
    """
    logits, targets = _check_data(logits, targets)
    return tuple(_fit_temperature(single, targets) for single in logits)


def _fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Find where the slope of the loss, convex in 1 / T, is zero: Newton's steps, and bisection where they fail."""
    logits = logits - logits.amax(-1, keepdim=True)
    target = logits.gather(1, targets[:, None])[:, 0]
    logits, target = logits[target.isfinite()], target[target.isfinite()]
    if bool((target == 0).all()):
        return 1.0
    finite = logits.clamp(min=-1e4)  # a probability of 0 times it is 0
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    inverse = 1.0
    for _ in range(60):
        probs = (logits * inverse).softmax(-1)
        mean = (probs * finite).sum(-1)
        slope = float((mean - target).mean(dtype=torch.float64))
        curve = float(((probs * finite * finite).sum(-1) - mean**2).mean(dtype=torch.float64))
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curve if curve > 0 else low
        inverse, last = (step if low < step < high else (low * high) ** 0.5), inverse
        if abs(inverse - last) <= 1e-6 * last:
            break
    return min(max(1 / inverse, TEMPERATURES[0]), TEMPERATURES[1])


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


def _find_path(policies: Sequence[ExitPolicy], logits: Sequence[Tensor]) -> list[ExitPolicy]:
    """Return a path from careful to cheap: policies before the first of these, then these.

    The most accurate policy on some samples may leave early already. Before it come those by which only the surest
    eighth, two eighths, ... of the samples leave that leave by it at each exit.

    Args:
        policies: Dearest first.
        logits: Of the samples that they were found on.
    """
    policies = [policy for policy in policies if policy.used]
    if not policies or policies[0].criterion == 'patience':
        return policies
    sign = 1 if CRITERIA[policies[0].criterion].leaves_at_least else -1
    scores = [
        (idx, sign * score[policies[0].leaves(idx, score)])
        for idx, _, score in walk(policies[0], logits)
        if score is not None
    ]
    path = []
    for eighths in range(1, 8):
        thresholds = list(policies[0].thresholds)
        for idx, leaving in scores:
            if len(leaving):
                thresholds[idx] = sign * float(leaving.double().quantile(1 - eighths / 8))
        path.append(replace(policies[0], thresholds=tuple(thresholds)))
    return path + policies


def _drops(
    path: Sequence[ExitPolicy],
    halves: Sequence[tuple[Sequence[Tensor], Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each policy the losses of the second half and of the first, as `last_safe` takes them."""
    caches = [{} for _ in halves]
    for policy in path:
        losses = []
        for (logits, targets), cache in zip(halves, caches):
            key = policy.used, policy.temperatures
            if key not in cache:
                cache[key] = [(idx, answer.argmax(-1) == targets, score) for idx, answer, score in walk(policy, logits)]
            *exits, (_, correct, _) = cache[key]
            reference = logits[-1].argmax(-1) == targets
            for idx, here, score in reversed(exits):
                correct = torch.where(policy.leaves(idx, score), here, correct)
            losses.append(drop_losses(correct, reference))
        yield losses[1], losses[0]


def _make_point(policy: ExitPolicy, counts: Sequence[int], right: int, all_costs: Sequence[StageCosts]) -> BudgetPoint:
    num = sum(counts)
    known = {
        costs.unit.lower(): sum(cost * count for cost, count in zip(costs.leaving(policy.used), counts)) / num
        for costs in all_costs
    }
    return BudgetPoint(policy, 100 * right / num, tuple(count / num for count in counts), **known)


def _check_data(logits: Sequence[Tensor], targets: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return logits in float32 or better and targets in int64, on the CPU."""
    check_logits(logits)
    num, num_classes = logits[0].shape
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != (num,):
        kind = f'{list(targets.shape)} of {targets.dtype}' if isinstance(targets, Tensor) else type(targets).__name__
        raise MultiExitError(f'Targets are {kind}, logits of {num} samples allow a tensor [{num}] of class indices.')
    targets = targets.detach().cpu().long()
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        raise MultiExitError(
            f'Targets go from {int(targets.min())} to {int(targets.max())}, logits of {num_classes} classes allow 0 to'
            f' {num_classes - 1}.'
        )
    logits = [single.detach().cpu() for single in logits]
    return [single if single.dtype == torch.float64 else single.float() for single in logits], targets


def _check_costs(costs: StageCosts | Sequence[ExitCost], num_exits: int) -> StageCosts:
    costs = costs if isinstance(costs, StageCosts) else StageCosts.from_exit_costs(costs)
    if len(costs.heads) != num_exits:
        raise MultiExitError(
            f'Costs are of {len(costs.heads)} exits, logits of {num_exits}: give one cost and one tensor of logits per'
            ' exit, and those of main.'
        )
    return costs
