"""Ctrl-C between the steps of a generator, whose consumer goes on with its own work in between."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.interrupts import Interrupt


class CtrlC:
    """While entered, SIGINT raises the interrupt and sets ``struck``, instead of an exception that strikes anywhere.

    Only in the main thread and only in place of Python's own handler: a program that handles SIGINT itself (as
    asyncio's runner does) goes on doing so. May be entered again and again.
    """

    __slots__ = ("_interrupt", "_set", "struck")

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self._set = False
        self.struck = False

    def __enter__(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        self._set = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._set:
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._set:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.struck = self._interrupt.raised = True
