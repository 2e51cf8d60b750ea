"""Names of classifiers, tables and units, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm_multiexit.utils.errors import is_integer

ENSEMBLE = 'ens'
_MACS_UNITS = ((1e9, 'GMACs'), (1e6, 'MMACs'), (1e3, 'kMACs'))


def exit_names(num_exits: int) -> tuple[str, ...]:
    """Return what the classifiers are called in columns and tables, shallow to deep, main last.

    >>> exit_names(2)
    ('exit0', 'exit1', 'main')
    """
    return (*(f'exit{idx}' for idx in range(num_exits)), 'main')


def macs_unit(largest: float) -> tuple[float, str]:
    """Return the unit that MACs up to `largest` are shown in: MACs per unit, and its name.

    >>> macs_unit(1.8e9), macs_unit(3e6), macs_unit(900)
    ((1000000000.0, 'GMACs'), (1000000.0, 'MMACs'), (1.0, 'MACs'))
    """
    return next((unit for unit in _MACS_UNITS if largest >= unit[0]), (1.0, 'MACs'))


def format_macs(macs: float, format_spec: str = '.4g') -> str:
    """Return MACs with their unit.

    >>> format_macs(1_814_073_344), format_macs(41_000_000, '.1f')
    ('1.814 GMACs', '41.0 MMACs')
    """
    scale, unit = macs_unit(macs)
    return f'{macs / scale:{format_spec}} {unit}'


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as text in columns: numbers to the right, floats with the digits of their size.

    >>> print(format_table([{'exit': 0, 'top-1': 98.6111}, {'exit': 'main', 'top-1': None}]))
    exit  top-1
    0     98.61
    main      -
    """
    if not rows:
        return '(none)'
    header = list(rows[0])
    right = {key for key in header if any(isinstance(row[key], (int, float)) for row in rows) and key != 'exit'}
    cells = [header] + [[_format_cell(row[key]) for key in header] for row in rows]
    sizes = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        '  '.join(
            cell.rjust(size) if key in right else cell.ljust(size) for key, cell, size in zip(header, line, sizes)
        ).rstrip()
        for line in cells
    ]
    return '\n'.join(lines)


def _format_cell(value: Any) -> str:
    if value is None:
        return '-'
    if is_integer(value):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.2f}' if abs(value) >= 1 or value == 0 else f'{value:.3g}'
    return str(value)
