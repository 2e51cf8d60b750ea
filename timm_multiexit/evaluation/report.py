"""The sections of the report on dynamic inference, as JSON-ready values and as text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm_multiexit.calibration.logits import LogitSet
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.calibration.thresholds import solve_budgeted_batch
from timm_multiexit.evaluation.diagnostics import failure_auroc, measure_falls, measure_overthinking
from timm_multiexit.policies.budgets import BudgetTable, PolicyResult, parse_budget
from timm_multiexit.utils.errors import InvalidValueError
from timm_multiexit.utils.text import exit_names, format_table

# In points of accuracy, by which one exit alone must be better than a policy to be named.
_NOTABLE = 1.0


class Calibration(NamedTuple):
    """The logits of the images that thresholds are chosen on, and a description of the images."""

    collected: LogitSet
    source: str


def report_order(collected: LogitSet) -> dict[str, Any]:
    """Return the sections that need no policy: failure_auroc, overthinking and monotonicity, in percent."""
    logits, targets = collected.logits, collected.targets
    names = exit_names(len(logits) - 1)
    return {
        'failure_auroc': {name: failure_auroc(single, targets) for name, single in zip(names, logits)},
        'overthinking': measure_overthinking(logits, targets)._asdict(),
        'monotonicity': {str(drop): share for drop, share in measure_falls(logits, targets).items()},
    }


def format_order(sections: Mapping[str, Any]) -> str:
    """Return the sections of `report_order` as three lines."""
    auroc = ', '.join(
        f'{name} {"-" if value is None else f"{value:.1f}"}' for name, value in sections['failure_auroc'].items()
    )
    over = sections['overthinking']
    falls = ', '.join(f'{100 * float(drop):.0f}: {share:.1f}' for drop, share in sections['monotonicity'].items())
    return (
        f'Failure AUROC (confidence of right over wrong), %: {auroc}\n'
        f'Right at an exit and wrong at main: {over["lost"]:.2f} %, right at main alone: {over["gained"]:.2f} %,'
        f' right at any: {over["right_somewhere"]:.2f} %\n'
        f'Images whose true class loses probability on the way, % by at least so many points: {falls}'
    )


def report_curve(meter: PolicyMeter, calibration: Calibration, costs: StageCosts, table: BudgetTable) -> dict[str, Any]:
    """Return the budgeted curve: the field's 39 policies, and those of the search for the same budgets.

    Budgets are costs on the images that thresholds are chosen on, where the search found its policies too; cost and
    accuracy are those of the reported split, which is the meter's.

    Raises:
        InvalidValueError: The costs are not in MACs.
    """
    collected = calibration.collected
    points = []
    for solved in solve_budgeted_batch(collected.logits, collected.targets, costs):
        # A tolerance, since equal costs may be rounded differently.
        best = table.best_within(_known_macs(solved) * (1 + 1e-6))
        points.append(
            {
                'budget_macs': solved.macs,
                'solver': describe_result(meter.measure(solved.policy), costs.total),
                'search': best and describe_result(meter.measure(best.policy), costs.total),
            }
        )
    return {'chosen_on': calibration.source, 'points': sorted(points, key=lambda point: point['budget_macs'])}


def format_curve(curve: Mapping[str, Any], split: str, total_macs: float, num_rows: int = 10) -> str:
    """Return the curve as a table of about `num_rows` of its points, the first and the last among them."""
    points = curve['points']
    places = sorted({round(idx * (len(points) - 1) / (num_rows - 1)) for idx in range(num_rows)})
    rows = []
    for point in (points[place] for place in places):
        row = {'budget, % of MACs': 100 * point['budget_macs'] / total_macs}
        for name in ('solver', 'search'):
            result = point[name] or {}
            row |= {f'{name}: % of MACs': result.get('macs_percent'), f'{name}: top-1': result.get('top-1')}
        rows.append(row)
    return (
        f'Budgets: thresholds are chosen on {curve["chosen_on"]}, MACs and accuracy are those of the {split} split;'
        f' {len(rows)} of {len(points)} points:\n\n{format_table(rows)}'
    )


def describe_result(result: PolicyResult, total_macs: float) -> dict[str, Any]:
    """Return a policy and its result as JSON-ready values; `total_macs` is main's."""
    macs = _known_macs(result)
    return {
        **result.policy.to_dict(),
        'top-1': result.accuracy,
        'shares': list(result.shares),
        'macs': macs,
        'macs_percent': 100 * macs / total_macs,
    }


def _known_macs(result: PolicyResult) -> float:
    if result.macs is None:
        raise InvalidValueError('The costs of policies must be in MACs.')
    return result.macs


def format_latency(latency: Mapping[str, Any]) -> str:
    """Return the latencies of `time_exits` as one line.

    >>> format_latency({'batch_size': 1, 'rounds': 5, 'device': 'cpu', 'ms': {'main in timm': 3.5, '0': 0.25}})
    'Latency of one image on cpu, medians of 5 rounds, ms: main in timm 3.500, exit_idx=0 0.250'
    """
    times = ', '.join(
        f'{f"exit_idx={name}" if name.isdecimal() else name} {value:.3f}' for name, value in latency['ms'].items()
    )
    return f'Latency of one image on {latency["device"]}, medians of {latency["rounds"]} rounds, ms: {times}'


def note_better_exits(policies: Sequence[Mapping[str, Any]], exits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each policy of a budget that one exit alone, within the same budget, beats by over a point.

    A search on enough images finds something as good, so its thresholds were chosen on too few of them.

    Args:
        policies: As for `format_dynamic`, that of main among them.
        exits: Rows of an `ExitTable`, without main and ensemble.
    """
    total = next(row['macs'] for row in policies if row['policy'] == 'main')
    notes = []
    for row in policies:
        budget = parse_budget(row['budget']) if row.get('budget') else None
        if budget is None or budget.unit == 'ms':
            continue
        limit = budget.value / 100 * total if budget.unit == '%' else budget.value
        within = [each for each in exits if each['GMACs fixed'] * 1e9 <= limit * (1 + 1e-6)]
        best = max(within, key=lambda each: each['top-1'], default=None)
        if best is not None and best['top-1'] > row['top-1'] + _NOTABLE:
            notes.append(
                f'{row["policy"]}: exit {best["exit"]} alone has {best["top-1"]:.2f} at'
                f' {100e9 * best["GMACs fixed"] / total:.1f} % of the MACs, more than this policy. Choose thresholds on'
                f' more images, or use exit_idx={best["exit"]}.'
            )
    return notes


def format_dynamic(rows: Sequence[Mapping[str, Any]], split: str, timing: Mapping[str, Any] | None) -> str:
    """Return the table of policies: what `describe_result` returns, with 'policy' (its name) and 'chosen_on'.

    If they were timed, rows have 'img/s' and 'time_ratio' too, and `timing` 'images', 'rounds' and 'device'.
    """
    lines = [
        {
            'policy': row['policy'],
            'thresholds': ' '.join(map(_format_threshold, row.get('thresholds', ()))),
            'leave, %': ' / '.join(f'{100 * share:.0f}' for share in row.get('shares', ())),
            'top-1': row['top-1'],
            'GMACs': row['macs'] / 1e9,
            '% of MACs': row['macs_percent'],
            **({'img/s': row['img/s'], 'img/s, main = 1': 1 / row['time_ratio']} if timing else {}),
        }
        for row in rows
    ]
    text = f'Policies on the {split} split, leaving at each exit and at main:\n\n{format_table(lines)}\n'
    chosen = {row['policy']: row['chosen_on'] for row in rows if row.get('chosen_on')}
    for source in dict.fromkeys(chosen.values()):
        names = ', '.join(name for name, other in chosen.items() if other == source)
        text += f'\nThresholds of {names} are chosen on {source}.'
    if timing:
        text += (
            f'\nSpeed: a batch of {timing["images"]} images, in turns, medians of {timing["rounds"]} rounds on'
            f' {timing["device"]}; above 1 is faster than main.'
        )
    return text.rstrip('\n')


def _format_threshold(value: float | None) -> str:
    """Return a threshold with four digits, or as many as tell it from 1, at which nobody is sure enough.

    >>> [_format_threshold(value) for value in (None, 0.5, 0.98765, 0.99996, 1.0)]
    ['-', '0.5', '0.9877', '0.99996', '1']
    """
    if value is None:
        return '-'
    return next((text for digits in (4, 6, 8) if float(text := f'{value:.{digits}g}') != 1), f'{value:.4g}')
