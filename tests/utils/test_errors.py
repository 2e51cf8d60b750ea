"""Kinds of errors, and checks of numbers."""

import math

import numpy as np
import pytest

from timm_multiexit.utils import errors
from timm_multiexit.utils.errors import MultiExitError, checked_number, checked_weights, is_integer, is_number, one_line

KINDS = {
    'InvalidValueError': ValueError,
    'InvalidTypeError': TypeError,
    'StateError': RuntimeError,
    'MissingFileError': FileNotFoundError,
    'DataError': ValueError,
    'CheckpointError': ValueError,
    'HubError': OSError,
    'DiskError': OSError,
}


@pytest.mark.parametrize(('name', 'builtin'), KINDS.items(), ids=KINDS)
def test_each_kind_is_a_multi_exit_error_and_the_builtin_one(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, MultiExitError)
    assert issubclass(kind, builtin)
    assert str(kind('one line.')) == 'one line.'


def test_base_is_no_builtin_error_of_its_own():
    assert MultiExitError.__bases__ == (Exception,)


NUMBERS = (0, -3, 0.5, np.float32(2), np.int64(2), 10**300)
OTHERS = (True, np.True_, None, '1', math.nan, math.inf, -math.inf, 10**400, 1j, [1])


@pytest.mark.parametrize('value', NUMBERS, ids=repr)
def test_is_number(value):
    assert is_number(value)


@pytest.mark.parametrize('value', OTHERS, ids=lambda value: repr(value)[:20])
def test_is_not_a_number(value):
    assert not is_number(value)
    with pytest.raises(errors.InvalidValueError, match=r'^rate must be a finite number >= 0, got '):
        checked_number('rate', value)


def test_is_integer():
    assert all(is_integer(value, 0, 3) for value in (0, 3))
    assert not any(is_integer(value, 0, 3) for value in (-1, 4, True, 1.0, '1', None))
    assert is_integer(10**400)


def test_checked_numbers_are_floats():
    assert type(checked_number('rate', np.int64(2), is_positive=True)) is float
    assert checked_weights('weights', (1, np.float32(0.5))) == (1.0, 0.5)
    with pytest.raises(errors.InvalidValueError, match=r'weights\[1\] must be a finite number >= 0, got -1'):
        checked_weights('weights', (1, -1))
    with pytest.raises(errors.InvalidTypeError, match='weights must be a list'):
        checked_weights('weights', '12')
    with pytest.raises(errors.InvalidValueError, match='rate must be a finite number > 0, got 0'):
        checked_number('rate', 0, is_positive=True)


def test_one_line_cuts_and_shows_what_is_printable():
    assert one_line('a\x00b\u202ec\n\td.') == 'a b c d.'
    assert one_line('x' * 300) == 'x' * 200
    assert one_line('x' * 300, limit=None) == 'x' * 300
    assert one_line(FileNotFoundError(2, 'No such file or directory', '/secret')) == 'No such file or directory'
    assert one_line(ValueError('wrong: ')) == 'wrong'
    assert one_line(AssertionError()) == 'AssertionError'
