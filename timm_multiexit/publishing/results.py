"""Rows of results, and the keys that tell what each row is about."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm_multiexit.utils.errors import is_number

Row = Mapping[str, Any]

# What a card compares by, the first that was measured.
MAIN_METRICS = ('top-1', 'mAP')

_KINDS = ((r'main|all exits', 'reference'), (r'budget .*', 'budget'), (r'max drop .*', 'max_drop'))


def add_row_keys(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results with `exit_idx` in the rows of classifiers, and `kind` and `budget` in those of policies.

    Files of earlier versions do not have these keys, so they are derived from the names here, and nowhere else. They
    call main of the network plain timm, too.

    >>> add_row_keys({'rows': [{'exit': '0'}], 'dynamic': [{'policy': 'budget 60%'}]})
    {'rows': [{'exit': '0', 'exit_idx': 0}], 'dynamic': [{'policy': 'budget 60%', 'kind': 'budget', 'budget': '60%'}]}
    """
    results = dict(results)
    if results.get('rows'):
        results['rows'] = [
            {**row, 'exit_idx': row.get('exit_idx', _find_exit(row.get('exit')))} for row in results['rows']
        ]
    ms = (results.get('latency') or {}).get('ms') or {}
    if 'plain timm' in ms:
        renamed = {'main in timm' if name == 'plain timm' else name: value for name, value in ms.items()}
        results['latency'] = {**results['latency'], 'ms': renamed}
    if results.get('dynamic'):
        results['dynamic'] = [
            {**row, 'policy': 'main'} if row.get('policy') == 'plain timm' else row for row in results['dynamic']
        ]
        results['dynamic'] = [row if 'kind' in row else {**row, **_find_kind(row)} for row in results['dynamic']]
    return results


def _find_exit(name: Any) -> int | str:
    return int(name) if str(name).isdecimal() else name


def _find_kind(row: Row) -> dict[str, str | None]:
    name = str(row.get('policy'))
    kind = next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, name, re.DOTALL)), 'threshold')
    kind = 'own' if name == "the model's own" else kind
    return {'kind': kind, 'budget': name.removeprefix('budget ') if kind == 'budget' else None}


def exit_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the early exits."""
    return [row for row in rows if isinstance(row['exit_idx'], int)]


def find_main(rows: Sequence[Row]) -> Row:
    """Return the row of main; an empty one if there is none."""
    return next((row for row in rows if row['exit_idx'] == 'main'), {})


def find_metric(rows: Sequence[Row]) -> str | None:
    """Return the metric that a card compares by; None if nothing was measured."""
    return next((name for name in MAIN_METRICS if any(is_number(row.get(name)) for row in rows)), None)


def measured_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Return the rows of dynamic inference with known accuracy and cost, references included."""
    needed = ('top-1', 'macs', 'macs_percent')
    return [row for row in metrics.get('dynamic') or () if all(is_number(row.get(name)) for name in needed)]


def policy_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Return the rows of policies with known accuracy and cost."""
    return [row for row in measured_rows(metrics) if row['kind'] != 'reference']


def find_default(metrics: Mapping[str, Any]) -> Row | None:
    """Return the row of the policy that the checkpoint has as its own; None if unknown."""
    return next((row for row in policy_rows(metrics) if row.get('is_default') is True), None)


def find_main_speed(metrics: Mapping[str, Any]) -> float | None:
    """Return images/s of main; those of policies do not match their ratios, since both are medians."""
    speeds = (row.get('img/s') for row in measured_rows(metrics) if row['policy'] == 'main')
    return next(filter(is_number, speeds), None)
