"""Stopping a run on a signal, between two steps."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

_logger = logging.getLogger(__name__)

# Updates between checks of whether a process got a signal; processes must agree, which costs a message.
_INTERVAL = 10

# Seconds in which a second SIGTERM is the first one again: a scheduler sends it to all processes, and a launcher that
# gets it sends it on.
_SAME_SIGNAL_SECONDS = 1.0


@contextmanager
def handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have SIGTERM and SIGINT handled by a function within the block; only in the main thread, where it can be set."""
    try:
        previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread
        previous = {}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def outlive_signals() -> None:
    """Let this process, which loads data, outlive SIGTERM and SIGINT: the one it works for saves, and ends it.

    Schedulers send them to all processes of a job, and torch gives up a run whose loading processes end. A later
    SIGTERM does end it, as torch does with processes that hang.
    """
    first = None

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Stopped(Exception):
    """The run got a signal, of this number, and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal = signal_number


class Stopper:
    """Notes SIGTERM or SIGINT, so that a run can save and stop after the step; a second one interrupts.

    A second SIGTERM within a second is the first one again. `signal` is the number of the signal that came, 0 for none.
    The processes of the accelerator stop together.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signal = 0
        self._noted = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals for the time of the block."""
        process = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != process:
                return  # processes that inherit this must outlive the step
            now = time.monotonic()
            if self.signal:
                if number == signal.SIGTERM and now - self._noted <= _SAME_SIGNAL_SECONDS:
                    return
                raise KeyboardInterrupt
            self.signal, self._noted = number, now
            _logger.info(f'{signal.Signals(number).name}: saving and stopping after this step.')

        with handling_signals(note):
            yield

    def is_asked(self, num_updates: int | None = None) -> bool:
        """Return whether to stop now, the same in all processes.

        Several processes look only at every tenth of `num_updates`, the updates of the run so far, or if it is None.
        """
        if self.accelerator.num_processes > 1:
            if num_updates is not None and num_updates % _INTERVAL:
                return False
            asked = torch.tensor([self.signal], device=self.accelerator.device)
            found = int(self.accelerator.gather(asked).max())
            if found and not self.signal:  # of another process: the one to this process is still to come
                self.signal, self._noted = found, time.monotonic()
            return bool(found)  # a signal that came meanwhile counts the next time, in all of them
        return bool(self.signal)
