"""Answers one exit after the other, in one thread."""

import threading
from collections.abc import Callable, Generator
from typing import Any

from timm_multiexit.utils.errors import StateError


class OwnThread:
    """An iterator over `steps`, closed with it, that can only be continued in the thread of its first step.

    Args:
        steps: What it iterates over.
        check: Called before every step; what it raises is raised, and the step is not taken.
    """

    def __init__(self, steps: Generator[Any, None, None], check: Callable[[], None] = lambda: None):
        self._steps = steps
        self._check = check
        self._thread: int | None = None

    def __iter__(self) -> 'OwnThread':
        return self

    def __next__(self) -> Any:
        self._thread = self._thread or threading.get_ident()
        # Checked here, since an error inside a generator would end it for its own thread too.
        if self._thread != threading.get_ident():
            raise StateError(
                'This iteration over the exits was begun in another thread: finish it there, or begin one in each.'
            )
        self._check()
        return next(self._steps)

    def close(self) -> None:
        """End it; the rest is not computed."""
        self._steps.close()
