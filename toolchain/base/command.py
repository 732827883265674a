"""The only place that starts a process.

Children stay in our process group, so a terminal's Ctrl-C and a ``kill -9`` of the group reach them all;
an interrupt that reaches only us takes down the child's whole tree. Only a ``Service`` has a session of its own: what
ends it is ours to decide, and our death.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from toolchain.base.errors import CommandError, FoundryError, MissingError

OPENMP_DEFAULTS: Mapping[str, str] = {"GOMP_SPINCOUNT": "10000"}
"""GNU OpenMP's threads spin at a barrier for milliseconds unless told otherwise; when anything else wants their
CPUs, generation can fall to a thousandth. The figures behind this bound stand in docs/performance.md."""
CUDA_DEFAULTS: Mapping[str, str] = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""CUDA numbers GPUs by speed unless told otherwise, NVML by PCI bus: with this both mean the same card by a number."""
TAIL_LINES = 20
_WINDOW = 4096  # characters of recent output that a progress parser sees
_LAST_BYTES = 1 << 16  # of a service's output that is evidence

_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
# prctl(2): PR_SET_PDEATHSIG is 1. It holds through the exec; a parent that died before it was set is another one now.

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""
ParseProgress = Callable[[str], tuple[int, int] | None]
"""Finds (done, total) in the most recent output, or None."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A child that ended with status 0: its last lines and its wall time."""

    output: str
    seconds: float


def run(
    argv: Sequence[str | Path],
    *,
    what: str,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    log: Path | None = None,
    parse: ParseProgress | None = None,
    on_progress: OnProgress | None = None,
    keep: int = 1 << 20,
    hint: str = "",
) -> Finished:
    """Run ``argv`` to its end, with stdout and stderr merged.

    All output goes to ``log`` (appended, behind the command line); the last ``keep`` characters are
    returned. ``env`` is added to our environment (None takes a variable away). Raises MissingError when
    the program is not there or the disk is full, CommandError (with the last lines, the command and the
    log) when it fails.
    """
    command = [str(part) for part in argv]
    started = time.monotonic()
    text = ""
    child = _start(
        command,
        what=what,
        hint=hint,
        cwd=cwd,
        env=_environment(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    sink = _open_log(log, command)
    try:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        assert child.stdout is not None
        while chunk := os.read(child.stdout.fileno(), 1 << 16):
            if sink:
                sink.write(chunk)
            text = (text + decoder.decode(chunk))[-keep:]
            if parse and on_progress and (progress := parse(text[-_WINDOW:])):
                on_progress(*progress)
        status = child.wait()
    except BaseException:
        _stop_tree(child)
        raise
    finally:
        if child.stdout:
            child.stdout.close()
        if sink:
            sink.close()
    if status != 0:
        raise _failed(what, command, status, text=text, log=log, hint=hint)
    return Finished(output=text, seconds=time.monotonic() - started)


def capture(
    argv: Sequence[str | Path],
    *,
    what: str,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    hint: str = "",
) -> str:
    """The merged output of a short command, stripped; errors as in ``run``."""
    return run(argv, what=what, cwd=cwd, env=env, hint=hint).output.strip()


def attach(argv: Sequence[str | Path], *, what: str, cwd: Path | None = None) -> None:
    """Run ``argv`` on our own terminal, its stdout on ours; CommandError when it fails."""
    command = [str(part) for part in argv]
    child = _start(command, what=what, hint="run `./inv` to mend the environment", cwd=cwd)
    try:
        status = child.wait()
    except BaseException:
        _stop_tree(child)
        raise
    if status != 0:
        raise _failed(what, command, status, text="", log=None, hint="")


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

    All output goes to ``log``, as in ``run``. The child's whole tree is ended with the body. Raises MissingError
    when the program is not there, CommandError when it ends or ``timeout_s`` pass before it is ready.
    """
    command = [str(part) for part in argv]
    sink = _open_log(log, command)
    assert sink is not None
    with sink:
        begin = sink.tell()
        environment = _environment(env or {})
        how = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": subprocess.STDOUT, "env": environment}
        child = _start(command, what=what, hint=hint, **how)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            status = child.poll()  # before the log is read, so that an ended child's last words are in it
            text = log.read_bytes()[begin:].decode(errors="replace")
            if (answer := ready(text)) is not None:
                break
            if status is not None:
                raise _failed(what, command, status, text=text, log=log, hint=hint)
            if time.monotonic() > deadline:
                message = f"{what}: {Path(command[0]).name} was not ready within {timeout_s:g} s"
                raise CommandError(message, evidence=_evidence(command, text, log), hint=hint)
            time.sleep(0.02)
        yield answer
    finally:
        if child.poll() is None:  # the id of one that was waited for may be another's by now
            _stop_tree(child)


class Service:
    """A long-lived child in a session of its own, its output in ``log``, which is begun anew.

    On Linux the kernel kills it when the thread that started it ends, so start it from the main thread.
    """

    def __init__(self, command: list[str], *, what: str, log: Path, child: subprocess.Popen[bytes]) -> None:
        self.command, self.what, self.log = command, what, log
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    def status(self) -> int | None:
        """Its exit status (negative: the signal that ended it), or None while it runs.

        Whatever it left behind in its session's process group is killed before its id is given back.
        """
        if self._child.returncode is None and _has_ended(self.pid):
            self._signal_group(signal.SIGKILL)
            self._child.wait()
        return self._child.returncode

    def ask_to_end(self) -> None:
        """SIGTERM, to the child alone: it ends its own children in order."""
        if self.status() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the child and all in its group; it has ended on return."""
        if self._child.returncode is None:
            self._signal_group(signal.SIGKILL)
            self._child.wait()

    def output(self) -> str:
        """The last of its output."""
        with self.log.open("rb") as source:
            source.seek(max(0, source.seek(0, os.SEEK_END) - _LAST_BYTES))
            return source.read().decode(errors="replace")

    def failed(self, how: str = "", *, hint: str = "") -> FoundryError:
        """The error of a child that ended by itself, or that did ``how``, with its last lines."""
        text = self.output().partition("\n")[2]
        status = self.status()
        if how or status is None:
            message = f"{self.what}: {Path(self.command[0]).name} {how or 'runs'}"
            return CommandError(message, evidence=_evidence(self.command, text, self.log), hint=hint)
        return _failed(self.what, self.command, status, text=text, log=self.log, hint=hint)

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(self.pid, number)


def start_service(
    argv: Sequence[str | Path],
    *,
    what: str,
    log: Path,
    env: Mapping[str, str | None] | None = None,
    hint: str = "",
) -> Service:
    """Start ``argv`` to run beside us; MissingError when the program is not there. ``env`` as of ``run``.

    A terminal's Ctrl-C does not reach it. The caller ends it; on Linux our death does too, whatever its cause.
    """
    command = [str(part) for part in argv]
    if shutil.which(command[0]) is None:
        raise MissingError(f"{what}: {command[0]} is not there", hint=hint or "run `./inv build`")
    tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())] if sys.platform == "linux" else []
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    sink = _open_log(log, command)
    assert sink is not None
    with sink:
        how = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": subprocess.STDOUT, "start_new_session": True}
        child = _start([*tied, *command], what=what, hint=hint, env=_environment(env or {}), **how)
    return Service(command, what=what, log=log, child=child)


def _has_ended(pid: int) -> bool:
    """Whether our child ``pid`` waits to be reaped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shown(argv: Sequence[str | Path]) -> str:
    """``argv`` as one line that a shell would take."""
    return shlex.join(str(part) for part in argv)


def prepended(variable: str, folder: Path) -> str:
    """The search path in an environment variable with ``folder`` before what it holds."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get(variable))))


def parse_counter(recent: str) -> tuple[int, int] | None:
    """The last ``[n/m]``, as ninja, llama-quantize and the demo model's training print it."""
    found = re.findall(r"\[\s*(\d+)\s*/\s*(\d+)\]", recent)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    kept = {
        name: value for name, value in {**OPENMP_DEFAULTS, **CUDA_DEFAULTS, **os.environ}.items() if name not in changes
    }
    return kept | {name: value for name, value in changes.items() if value is not None}


def _start(command: list[str], *, what: str, hint: str, **how: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, **how)
    except FileNotFoundError as error:
        raise MissingError(
            f"{what}: {command[0]} is not there", evidence=str(error), hint=hint or "run `./inv build`"
        ) from error
    except OSError as error:
        raise CommandError(f"{what}: {command[0]} cannot be started", evidence=str(error), hint=hint) from error


def _open_log(log: Path | None, command: list[str]) -> IO[bytes] | None:
    if log is None:
        return None
    log.parent.mkdir(parents=True, exist_ok=True)
    sink = log.open("ab", buffering=0)
    sink.write(f"$ {shown(command)}\n".encode())
    return sink


def _failed(what: str, command: list[str], status: int, *, text: str, log: Path | None, hint: str) -> FoundryError:
    evidence = _evidence(command, text, log)
    if "No space left on device" in text:
        return MissingError(
            f"{what}: the disk is full",
            evidence=evidence,
            hint="free some space, run `./inv clean`, or set FOUNDRY_HOME to a larger disk",
        )
    if status < 0:
        name = signal.Signals(-status).name
        why = " (out of memory?)" if -status == signal.SIGKILL else ""
        ended = f"was ended by {name}{why}"
    else:
        ended = f"ended with status {status}"
    return CommandError(f"{what}: {Path(command[0]).name} {ended}", evidence=evidence, hint=hint)


def _evidence(command: list[str], text: str, log: Path | None) -> str:
    tail = "\n".join(text.replace("\r", "\n").splitlines()[-TAIL_LINES:])
    return f"{tail}\n$ {shown(command)}" + (f"\nlog: {log}" if log else "")


def _stop_tree(child: subprocess.Popen[bytes]) -> None:
    """SIGINT to the child's tree, five seconds of grace, then SIGKILL to what is left."""
    try:
        root = psutil.Process(child.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        child.wait()
        return
    for process in family:
        try:
            process.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    child.wait()
