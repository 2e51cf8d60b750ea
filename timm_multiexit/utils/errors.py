"""What other libraries raise, and what they say in one line."""

import math
import reprlib
from collections.abc import Iterable
from numbers import Real
from typing import Any


def brief(value: Any) -> str:
    """Return a value in at most 80 printable characters, for a message.

    >>> brief([1] * 1000)
    '[1, 1, 1, 1, 1, 1, ...]'
    """
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


class MultiExitError(ValueError):
    """A request that cannot be met. The message is one line: what was wrong, what is allowed, what to do."""


def checked_number(name: str, value: float, is_positive: bool = False) -> float:
    """Return a finite number of 0 or more, or above 0, as float.

    Args:
        name: What it is called in the message.
        value: The number.
        is_positive: 0 is not allowed.

    Raises:
        MultiExitError: It is something else.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (is_positive and value == 0):
        allowed = 'above 0' if is_positive else 'of 0 or more'
        raise MultiExitError(f'{name} is {value!r}, allowed is a finite number {allowed}; change it.')
    return float(value)


def checked_weights(name: str, weights: Iterable[float]) -> tuple[float, ...]:
    """Return a list of finite numbers of 0 or more as floats.

    Args:
        name: What it is called in the message.
        weights: The numbers.

    Raises:
        MultiExitError: It is something else.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise MultiExitError(
            f'{name} is {weights!r}, allowed is a list with one number for each classifier;'
            ' give them exits shallow to deep, then main.'
        )
    return tuple(checked_number(f'{name}[{idx}]', weight) for idx, weight in enumerate(weights))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, numpy's included; no bool."""
    # Compared, since isfinite fails on an integer beyond floats; NaN and infinity are not within.
    return isinstance(value, Real) and not isinstance(value, bool) and -1e300 <= value <= 1e300


# Of timm and torch, for keywords and numbers that they do not take, and for weights that are not to be had.
REFUSALS = (TypeError, ValueError, AssertionError, IndexError, RuntimeError, OSError)


def one_line(error: object, limit: int | None = 200) -> str:
    r"""Return an error's words on one printable line without a stop at its end, its type where it has none.

    Args:
        error: The error, or somebody's words.
        limit: Characters, None for all.

    >>> one_line(OSError('No space left\non device.')), one_line(KeyError()), one_line('')
    ('No space left on device', 'KeyError', '')
    """
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror  # without its number and the path, which the message has
    words = ' '.join(''.join(sign if sign.isprintable() else ' ' for sign in str(error)).split())
    return words[:limit].rstrip('.: ') or (type(error).__name__ if isinstance(error, BaseException) else '')
