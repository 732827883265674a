"""Ctrl-C as a wish that is looked at between tokens, instead of an exception that strikes anywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Set once SIGINT came; whoever works looks at ``raised`` and stops in good order."""

    __slots__ = ("raised",)

    def __init__(self) -> None:
        self.raised = False


@contextmanager
def interrupts_noted() -> Iterator[Interrupt]:
    """While the body runs, SIGINT sets the flag and raises nothing. Without effect outside the main thread.

    An exception raised inside a callback of the C library would be swallowed there; a flag is not.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        interrupt.raised = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
