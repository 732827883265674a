"""`python -m runtime ...` at a pseudo-terminal, and the screen that a user would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyte

PATIENCE_S = 120  # a bound against hanging, not an expectation
SCROLLBACK = 10_000

ENTER = "\r"
NEW_LINE = "\n"  # Ctrl-J
ALT_ENTER = "\x1b\r"
CTRL_C = "\x03"
CTRL_D = "\x04"
UP = "\x1b[A"
TAB = "\t"


def pasted(text: str) -> str:
    """What a terminal sends for text that is pasted, where the program asked to be told."""
    return f"\x1b[200~{text}\x1b[201~"


class _Screen(pyte.HistoryScreen):
    """Answers when it is asked where its cursor is, as terminals do."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows, history=SCROLLBACK, ratio=0.5)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)


class PseudoTerminal:
    """A child at a terminal of ``columns`` by ``rows``: keys to press, and what its screen shows."""

    def __init__(self, process: int, descriptor: int, columns: int, rows: int) -> None:
        self.process = process
        self.raw = b""
        self._descriptor = descriptor
        self._screen = _Screen(columns, rows, self.press)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def display(self) -> list[str]:
        """The rows of the screen, without the blanks at their ends."""
        return [row.rstrip() for row in self._screen.display]

    @property
    def lines(self) -> list[str]:
        """All rows, those that have left the screen at its top first; no blank ones at the end."""
        left = ["".join(row[at].data for at in range(self._screen.columns)) for row in self._screen.history.top]
        rows = [*(row.rstrip() for row in left), *self.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def title(self) -> str:
        """What the program has set as the window's title."""
        return str(self._screen.title)

    def press(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_for(self, pattern: str, *, times: int = 1) -> str:
        """Read until ``pattern`` (``^`` and ``$`` match at each row) shows that often; all rows then, as text."""
        expression = re.compile(pattern, re.MULTILINE)
        self.wait_until(lambda: len(expression.findall(self.text)) >= times, pattern)
        return self.text

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            seen = f"{what!r} did not show on:\n{self.text}"
            assert time.monotonic() < deadline, seen
            assert self._read(1.0) is not False, f"the child ended before {seen}"

    def resize(self, columns: int, rows: int) -> None:
        """As when the user drags the window; the rows that are there are cut and not folded anew."""
        self._screen.resize(rows, columns)
        _set_size(self._descriptor, columns, rows)

    def echoes(self) -> bool:
        """Whether the terminal shows keys by itself."""
        return bool(termios.tcgetattr(self._descriptor)[3] & termios.ECHO)

    def ended(self) -> int:
        """Read to the end of the child; its exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read(1.0) is not False:
            assert time.monotonic() < deadline, f"the child goes on:\n{self.text}"
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def _read(self, timeout_s: float) -> bool | None:
        """Whether something came; None when nothing did in time, False when nothing will."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return None
        try:
            raw = os.read(self._descriptor, 1 << 16)
        except OSError:  # Linux: the other end was closed
            return False
        self.raw += raw
        self._stream.feed(raw)
        return bool(raw)


@contextmanager
def at_terminal(
    arguments: Sequence[object], environment: Mapping[str, str], *, columns: int = 80, rows: int = 24, program: str = ""
) -> Iterator[PseudoTerminal]:
    """``python -m runtime ARGUMENTS`` (or ``python -c PROGRAM``) at a terminal; killed at the end if it still runs."""
    start = ["-c", program] if program else ["-m", "runtime"]
    with forked([*start, *map(str, arguments)], environment, columns=columns, rows=rows) as (process, descriptor):
        yield PseudoTerminal(process, descriptor, columns, rows)


@contextmanager
def forked(
    arguments: Sequence[str], environment: Mapping[str, str], *, columns: int = 80, rows: int = 24
) -> Iterator[tuple[int, int]]:
    """(process id, descriptor of its terminal) of a Python with ``arguments``; killed at the end if it still runs."""
    process, descriptor = pty.fork()
    if process == 0:
        _set_size(0, columns, rows)
        os.execve(sys.executable, [sys.executable, *arguments], dict(environment))
    try:
        yield process, descriptor
    finally:
        os.close(descriptor)
        try:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def _set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
