"""Text."""

from collections.abc import Mapping, Sequence
from typing import Any

ENSEMBLE = 'ens'


def exit_names(num_exits: int) -> tuple[str, ...]:
    """Return what the classifiers are called in columns and tables, shallow to deep, main last.

    >>> exit_names(2)
    ('exit0', 'exit1', 'main')
    """
    return (*(f'exit{idx}' for idx in range(num_exits)), 'main')


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
    if isinstance(value, int) and not isinstance(value, bool):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.2f}' if abs(value) >= 1 or value == 0 else f'{value:.3g}'
    return str(value)
