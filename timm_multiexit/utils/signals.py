"""Stopping a run on a signal, between two steps."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

_logger = logging.getLogger(__name__)

# Updates between checks of whether a process got a signal; processes must agree, which costs a message.
_INTERVAL = 10


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


class Stopped(Exception):
    """The run got a signal, of this number, and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal = signal_number


class Stopper:
    """Notes SIGTERM and the first SIGINT, so that a run can save and stop after the step; a second one interrupts.

    `signal` is the number of the signal that came, 0 for none. The processes of the accelerator stop together.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals for the time of the block."""
        process = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != process:
                return  # data loading processes, which inherit this, must outlive the step
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number
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
            self.signal = int(self.accelerator.gather(asked).max())
        return bool(self.signal)
