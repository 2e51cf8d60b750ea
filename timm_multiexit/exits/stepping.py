"""A computation that can be suspended in the middle: the only code that uses greenlet."""

import contextvars
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from torch.utils._pytree import tree_leaves


class _Modes(NamedTuple):
    """What torch keeps per thread and a computation depends on."""

    inference: bool
    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> '_Modes':
        accelerator = torch.accelerator.current_accelerator()
        devices = {'cpu', accelerator.type} if accelerator else {'cpu'}
        autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in sorted(devices)
        ]
        return cls(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), tuple(autocast))

    def enter(self, stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode(self.inference))  # sets the gradient mode too, so it comes first
        stack.enter_context(torch.set_grad_enabled(self.grad))
        for device, is_enabled, dtype in self.autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=is_enabled))


class _Waiting:
    """The steppers of one thread that may still wait; they are ended with the thread.

    A greenlet can only be ended in its own thread: one that outlived it would never be freed, nor what its forward
    holds.
    """

    def __init__(self) -> None:
        self.steppers: weakref.WeakSet[Stepper] = weakref.WeakSet()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            for stepper in list(self.steppers):
                stepper.stop(GreenletExit())


class _Thread(threading.local):
    """What belongs to the thread that runs; it is let go of when that thread ends, in it."""

    def __init__(self) -> None:
        self.waiting = _Waiting()


_thread = _Thread()


class Stepper:
    """Runs a function that hands out values on its way and waits after each.

    A greenlet has a stack of its own in the same thread, so a forward can wait in the middle of any backbone's code;
    a second thread would bring a second pool of OpenMP threads. What torch keeps per thread (gradient mode, inference
    mode, autocast, the current stream) is not part of a greenlet: both sides get theirs back at every switch. All of
    the function runs on the stream that was current when it began, and whoever resumes it has a stream that waits for
    that one.

    Args:
        function: Called with `pause`, which hands a value to `resume` and returns when it is called again.
        device: Where it computes.
    """

    def __init__(self, function: Callable[[Callable[[Any], None]], Any], device: torch.device | None = None):
        self._greenlet = greenlet(lambda: function(self._pause))
        self._greenlet.gr_context = contextvars.copy_context()
        self._thread = threading.get_ident()
        self._modes: _Modes | None = None
        self._device = device if device is not None and device.type not in ('cpu', 'meta') else None
        self._stream = self._current_stream()
        _thread.waiting.steppers.add(self)

    def resume(self) -> tuple[bool, Any]:
        """Run to the next value, in the thread that made this.

        Returns:
            (False, value) as `pause` was given it, or (True, value) as the function returned it.
        """
        value = self._switch(self._greenlet, self._greenlet.switch)
        caller = self._current_stream()
        if caller != self._stream:
            caller.wait_stream(self._stream)
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor):
                    leaf.record_stream(caller)  # or its memory would be used again before the caller has read it
        return self._greenlet.dead, value

    def stop(self, error: BaseException) -> None:
        """End the function by raising `error` where it waits; nothing happens if it has ended or never began."""
        # A collector may close an iterator in any thread. A greenlet ends in its own thread alone, with it at the
        # latest, or by itself once nobody refers to it; the function's frames refer to this object.
        waiting, self._greenlet = self._greenlet, None
        if waiting and threading.get_ident() == self._thread:
            self._switch(waiting, waiting.throw, error)

    def _switch(self, to: greenlet, switch: Callable[..., Any], *args: Any) -> Any:
        to.parent = getcurrent()
        # Entered even where nothing differs: what is left on the way out is the caller's modes, whatever the function
        # has set in between.
        with ExitStack() as stack:
            (self._modes or _Modes.current()).enter(stack)
            if self._stream is not None:
                stack.enter_context(self._stream)
            return switch(*args)

    def _pause(self, value: Any) -> None:
        self._modes = _Modes.current()
        getcurrent().parent.switch(value)

    def _current_stream(self) -> Any:
        return None if self._device is None else torch.accelerator.current_stream(self._device)
