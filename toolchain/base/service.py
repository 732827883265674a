"""A child that runs beside us until we end it: in a session of its own, its output in a log."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from toolchain.base.command import Child, evidence_of, failure, open_log, start_beside
from toolchain.base.errors import CommandError, FoundryError, MissingError

_LAST_BYTES: Final = 1 << 16  # of the output that is evidence
_POLL_S: Final = 0.02

_TIED: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
# prctl(2): PR_SET_PDEATHSIG is 1. It holds through the exec; a parent that died before it was set is another one now.


class Service:
    """The child. On Linux the kernel kills it when the thread that started it ends, so start it from the main thread.

    ``begin``: where its output begins in ``log``, in bytes.
    """

    def __init__(self, command: list[str], *, what: str, log: Path, begin: int, child: Child) -> None:
        self.command, self.what, self.log = command, what, log
        self._begin = begin
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    def status(self) -> int | None:
        """Its exit status (negative: the signal that ended it), or None while it runs.

        Whatever it left behind in its session's process group is killed before its id is given back.
        """
        if self._child.returncode is None and _has_ended(self.pid):
            self.kill()
        return self._child.returncode

    def ask_to_end(self) -> None:
        """SIGTERM, to the child alone: it ends its own children in order."""
        if self.status() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the child and all in its group; it has ended on return."""
        if self._child.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
                os.killpg(self.pid, signal.SIGKILL)
            self._child.wait()

    def output(self) -> str:
        """The last of its output."""
        with self.log.open("rb") as source:
            source.seek(max(self._begin, source.seek(0, os.SEEK_END) - _LAST_BYTES))
            return source.read().decode(errors="replace")

    def failed(self, how: str = "", *, hint: str = "") -> FoundryError:
        """The error of a child that ended by itself, or that did ``how``, with its last lines."""
        text, status = self.output(), self.status()
        if how or status is None:
            message = f"{self.what}: {Path(self.command[0]).name} {how or 'runs'}"
            return CommandError(message, evidence=evidence_of(self.command, text, self.log), hint=hint)
        return failure(self.what, self.command, status, text=text, log=self.log, hint=hint)


def start_service(
    argv: Sequence[str | Path],
    *,
    what: str,
    log: Path,
    env: Mapping[str, str | None] | None = None,
    hint: str = "",
) -> Service:
    """Start ``argv`` to run beside us; MissingError when the program is not there. ``env`` and ``log`` as of
    ``command.run``.

    A terminal's Ctrl-C does not reach it. The caller ends it; on Linux our death does too, whatever its cause.
    """
    command = [str(part) for part in argv]
    if shutil.which(command[0]) is None:
        raise MissingError(f"{what}: {command[0]} is not there", hint=hint or "run `./inv build`")
    tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())] if sys.platform == "linux" else []
    with open_log(log, command) as sink:
        begin = sink.tell()
        child = start_beside([*tied, *command], what=what, hint=hint, env=env or {}, sink=sink)
    return Service(command, what=what, log=log, begin=begin, child=child)


@contextmanager
def serving(
    argv: Sequence[str | Path],
    *,
    what: str,
    log: Path,
    ready: Callable[[str], str | None],
    timeout_s: float,
    env: Mapping[str, str | None] | None = None,
    hint: str = "",
) -> Iterator[str]:
    """Run ``argv`` beside the body: what ``ready`` finds in its output so far is yielded once it is not None.

    The child is killed with the body. Raises as ``start_service``, and CommandError when it ends or ``timeout_s``
    pass before it is ready.
    """
    service = start_service(argv, what=what, log=log, env=env, hint=hint)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            status = service.status()  # before the log is read, so that an ended child's last words are in it
            if (answer := ready(service.output())) is not None:
                break
            if status is not None:
                raise service.failed(hint=hint)
            if time.monotonic() > deadline:
                raise service.failed(f"was not ready within {timeout_s:g} s", hint=hint)
            time.sleep(_POLL_S)
        yield answer
    finally:
        service.kill()


def _has_ended(pid: int) -> bool:
    """Whether our child ``pid`` waits to be reaped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
