"""An iteration over exits belongs to the thread that began it."""

import threading

from timm_multiexit.inference.anytime import OwnThread
from timm_multiexit.utils.errors import MultiExitError


def test_own_thread_alone_goes_on_and_can_after_another_has_tried():
    steps, errors = OwnThread(number for number in range(3)), []
    assert next(steps) == 0

    def other():
        try:
            next(steps)
        except MultiExitError as error:
            errors.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert errors == [
        'This iteration over the exits was begun in another thread: finish it there, or begin one in each.'
    ]
    assert list(steps) == [1, 2]


def test_closing_own_thread_closes_what_it_iterates_over():
    log = []

    def steps():
        try:
            yield 0
        finally:
            log.append('closed')

    own = OwnThread(steps())
    next(own)
    own.close()
    assert log == ['closed']
    assert list(own) == []
