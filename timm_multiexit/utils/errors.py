"""Errors of this package, checks of numbers, and helpers for errors raised by other libraries."""

import math
import operator
import reprlib
from collections.abc import Iterable
from numbers import Real
from typing import Any, TypeGuard


def brief(value: Any) -> str:
    """Return a value in at most 80 printable characters, for a message.

    >>> brief([1] * 1000)
    '[1, 1, 1, 1, 1, 1, ...]'
    """
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


class MultiExitError(Exception):
    """Base of all errors raised on purpose.

    The message is one line: `NAME must be ALLOWED, got VALUE. HINT`. Each kind is also the built-in error that Python
    users would catch for it.
    """


class InvalidValueError(MultiExitError, ValueError):
    """An argument, a flag or a combination of them has a value that is not allowed."""


class InvalidTypeError(MultiExitError, TypeError):
    """An argument is of the wrong type."""


class StateError(MultiExitError, RuntimeError):
    """What was called does not go with the state that the model or the run is in."""


class MissingFileError(MultiExitError, FileNotFoundError):
    """A file or folder does not exist."""


class DataError(MultiExitError, ValueError):
    """A data set, an image or a label cannot be used."""


class CheckpointError(MultiExitError, ValueError):
    """A model folder, a training checkpoint or a file of a run cannot be read, or its content is not allowed."""


class HubError(MultiExitError, OSError):
    """The Hugging Face Hub refused a request, or could not be reached."""


class DiskError(MultiExitError, OSError):
    """A file could not be written."""


def checked_number(name: str, value: float, is_positive: bool = False) -> float:
    """Return a finite number of 0 or more, or above 0, as float; `name` is what the message calls it.

    Raises:
        InvalidValueError: It is something else.
    """
    if not is_number(value) or value < 0 or (is_positive and value == 0):
        allowed = 'a finite number > 0' if is_positive else 'a finite number >= 0'
        raise InvalidValueError(f'{name} must be {allowed}, got {value!r}.')
    return float(value)


def checked_weights(name: str, weights: Iterable[float]) -> tuple[float, ...]:
    """Return a list of finite numbers of 0 or more as floats; `name` is what the message calls it.

    Raises:
        InvalidTypeError: It is not a list.
        InvalidValueError: One of them is not such a number.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise InvalidTypeError(
            f'{name} must be a list with one number for each classifier, exits shallow to deep, then main,'
            f' got {weights!r}.'
        )
    return tuple(checked_number(f'{name}[{idx}]', weight) for idx, weight in enumerate(weights))


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number, numpy's included, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return abs(float(value)) <= 1e300  # NaN and infinity are not
    except OverflowError:  # an integer beyond floats
        return False


def is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> TypeGuard[int]:
    """Return whether a value is an integer from `least` to `most`, numpy's included, and not a bool."""
    if type(value) is int:
        return least <= value <= most
    # Tensors of one element say that they are integers too, whatever their dimensions and type.
    is_bool = isinstance(value, bool) or str(getattr(value, 'dtype', '')) in ('bool', 'torch.bool')
    if is_bool or getattr(value, 'ndim', False):
        return False
    try:
        return least <= operator.index(value) <= most
    except TypeError:
        return False


# What timm and torch raise for keywords and values that they do not accept, and for weights that they cannot find.
LIBRARY_ERRORS = (TypeError, ValueError, AssertionError, IndexError, RuntimeError, OSError)


def one_line(text: object, limit: int | None = 200) -> str:
    r"""Return a text on one line, without control and invisible characters, cut to `limit` characters if there is one.

    Of an error it is the message without the period at its end, or the name of its type where that is empty.

    >>> one_line('a\n---\tb.'), one_line(OSError('No space left\non device.')), one_line(KeyError())
    ('a --- b.', 'No space left on device', 'KeyError')
    """
    # Of the system's errors without the number and the path, which the message of the caller has.
    source = text.strerror if isinstance(text, OSError) and text.strerror else text
    words = ' '.join(''.join(sign if sign.isprintable() else ' ' for sign in str(source)).split())[:limit]
    return words.rstrip('.: ') or type(text).__name__ if isinstance(text, BaseException) else words
