"""Stepping: a computation that waits keeps its modes and leaves those of its caller alone."""

import contextvars
import threading

import pytest
import torch

from timm_multiexit.exits.stepping import Stepper


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')


def test_values_come_one_by_one_and_then_what_the_function_returns():
    log = []

    def function(pause):
        for idx in range(2):
            log.append(f'before {idx}')
            pause(idx)
            log.append(f'after {idx}')
        return 'end'

    stepper = Stepper(function)
    assert log == []
    assert stepper.resume() == (False, 0)
    assert log == ['before 0']
    assert stepper.resume() == (False, 1)
    assert log == ['before 0', 'after 0', 'before 1']
    assert stepper.resume() == (True, 'end')
    assert log[-1] == 'after 1'


def test_error_of_the_function_reaches_the_caller():
    def function(pause):
        pause(0)
        raise KeyError('inside')

    stepper = Stepper(function)
    stepper.resume()
    with pytest.raises(KeyError, match='inside'):
        stepper.resume()


def test_stop_raises_where_the_function_waits():
    log = []

    def function(pause):
        try:
            pause(0)
        except ValueError as error:
            log.append(str(error))
        finally:
            log.append('left')

    Stepper(function).stop(ValueError('never began'))
    stepper = Stepper(function)
    stepper.resume()
    stepper.stop(ValueError('enough'))
    stepper.stop(ValueError('again'))
    assert log == ['enough', 'left']


OUTER = {
    'gradients': lambda: torch.enable_grad(),
    'no_grad': lambda: torch.no_grad(),
    'inference_mode': lambda: torch.inference_mode(),
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
}


@pytest.mark.parametrize('first', OUTER)
@pytest.mark.parametrize('second', OUTER)
@pytest.mark.parametrize('inner', OUTER)
def test_function_and_caller_keep_their_own_modes(first, second, inner):
    """The function begins in one mode, goes on from another, and enters a third across a pause."""
    seen = []

    def function(pause):
        seen.append(modes())
        pause(0)
        seen.append(modes())
        with OUTER[inner]():
            seen.append(modes())
            pause(1)
            seen.append(modes())
        seen.append(modes())

    stepper = Stepper(function)
    for name in (first, second, first):
        with OUTER[name]():
            before = modes()
            stepper.resume()
            assert modes() == before
        assert modes() == (True, False, False)
    with OUTER[first]():
        began = modes()
        with OUTER[inner]():
            inside = modes()
    assert seen == [began, began, inside, inside, began]


def test_autocast_of_the_function_computes_as_it_began():
    weight = torch.ones(2, 2)

    def function(pause):
        pause((weight @ weight).dtype)
        pause((weight @ weight).dtype)

    stepper = Stepper(function)
    with torch.autocast('cpu', torch.bfloat16):
        assert stepper.resume()[1] == torch.bfloat16
    assert (weight @ weight).dtype == torch.float32
    assert stepper.resume()[1] == torch.bfloat16
    assert (weight @ weight).dtype == torch.float32


def test_context_variables_are_seen_inside():
    variable = contextvars.ContextVar('variable', default='unset')
    variable.set('outside')
    assert Stepper(lambda pause: variable.get()).resume() == (True, 'outside')


def test_what_another_thread_stops_ends_in_its_own():
    log = []

    def function(pause):
        try:
            pause(0)
        finally:
            log.append('left')

    stepper = Stepper(function)
    stepper.resume()
    thread = threading.Thread(target=lambda: stepper.stop(ValueError('by a collector')))
    thread.start()
    thread.join()
    assert log == []
    assert Stepper(lambda pause: 'next').resume() == (True, 'next')
    assert log == ['left']


def test_steppers_nest():
    def inner(pause):
        pause('inner 0')
        return 'inner end'

    def outer(pause):
        stepper = Stepper(inner)
        pause(stepper.resume()[1])
        pause('outer 1')
        return stepper.resume()[1]

    stepper = Stepper(outer)
    assert [stepper.resume()[1] for _ in range(3)] == ['inner 0', 'outer 1', 'inner end']
