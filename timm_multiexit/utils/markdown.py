"""Markdown from untrusted names and numbers: text that is shown as it is."""

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from timm_multiexit.utils.errors import is_number, one_line

# An underscore emphasizes at the edge of a word alone; a colon, a dot and an at sign make links inside of addresses.
_MARKUP = re.compile(r"""(?<![^\W_])_|_(?![^\W_])|:(?=/)|(?<=www)\.|(?<=\w)@|@(?=\w)|[^\w .,:;@/%()+=?!'"-]""")


_MAX_TEXT = 500  # characters


def escape(text: Any) -> str:
    r"""Return a text as Markdown that shows it, in running text and in the cell of a table.

    Letters, digits and marks that mean nothing where they are stay, all else becomes an entity.

    >>> escape('layer1.0 @ 2 GHz'), escape('a|b <b>'), escape('_a_b'), escape('http://a')
    ('layer1.0 @ 2 GHz', 'a&#124;b &#60;b&#62;', '&#95;a_b', 'http&#58;//a')
    """
    return _MARKUP.sub(lambda match: f'&#{ord(match[0])};', one_line(text, _MAX_TEXT))


def code(text: Any) -> str:
    """Return a name in code style; what code style could not hold is escaped instead, None is '-'.

    >>> code('layer1.0'), code('a`b')
    ('`layer1.0`', 'a&#96;b')
    """
    line = one_line('-' if text is None else text, _MAX_TEXT)
    return f'`{line}`' if re.fullmatch(r"[\w.:/@%+=,()' -]*\w[\w.:/@%+=,()' -]*", line) else escape(line)


def link(text: str, address: str) -> str:
    """Return a link; the text alone unless the address is one of https without marks that end it."""
    return f'[{text}]({address})' if re.fullmatch(r'https://[\w./%?=#~-]+', address, re.ASCII) else text


def fence(text: str, language: str = '') -> str:
    """Return a block of code, whatever backticks there are in it."""
    marks = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{marks}{language}\n{text.strip()}\n{marks}'


def table(rows: Sequence[Mapping[str, str]], *, left: Sequence[str] = ()) -> str:
    """Return rows of Markdown (column -> cell) as a table, without the columns that are '-' or missing in every row.

    Columns in `left` are aligned to the left, the others to the right.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if any(row.get(column, '-') != '-' for row in rows)]
    lines = [columns, [':--' if column in left else '--:' for column in columns]]
    lines += [[row.get(column, '-') for column in columns] for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def number(value: Any, decimals: int | None = None) -> str:
    """Return a number as text: integers with commas, others with so many decimals or with four digits.

    >>> number(11689512), number(0.0371234), number(80.796, 2), number(None)
    ('11,689,512', '0.03712', '80.80', '-')
    """
    if not is_number(value):
        return '-' if value is None or isinstance(value, Real) else escape(value)
    if isinstance(value, int):
        return f'{value:,}'
    if decimals is not None:
        return f'{value:.{decimals}f}'
    return f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}'
