"""The only place that starts a process.

Children stay in our process group, so a terminal's Ctrl-C and a ``kill -9`` of the group reach them all;
an interrupt that reaches only us takes down the child's whole tree. Only a ``service.Service`` has a session of its
own: what ends it is ours to decide, and our death.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import psutil

from toolchain.base.errors import CommandError, FoundryError, MissingError

OPENMP_DEFAULTS: Mapping[str, str] = {"GOMP_SPINCOUNT": "10000"}
"""GNU OpenMP's threads spin at a barrier for milliseconds unless told otherwise; when anything else wants their
CPUs, generation can fall to a thousandth. The figures behind this bound stand in docs/performance.md."""
CUDA_DEFAULTS: Mapping[str, str] = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""CUDA numbers GPUs by speed unless told otherwise, NVML by PCI bus: with this both mean the same card by a number."""
TAIL_LINES = 20
GRACE_S = 5.0
_WINDOW = 4096  # characters of recent output that a progress parser sees

Child: TypeAlias = subprocess.Popen[bytes]
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
    on_line: Callable[[str], None] | None = None,
    keep: int = 1 << 20,
    grace_s: float = GRACE_S,
    hint: str = "",
) -> Finished:
    """Run ``argv`` to its end, with stdout and stderr merged; ``on_line`` gets each whole line.

    All output goes to ``log`` (appended, behind the command line); the last ``keep`` characters are returned. ``env``
    is added to our environment (None takes a variable away). When we are interrupted, the child has ``grace_s`` to end
    by itself. Raises MissingError when the program is not there or the disk is full, CommandError (with the last lines,
    the command and the log) when it fails.
    """
    command = [str(part) for part in argv]
    started = time.monotonic()
    text = unfinished = ""
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
    sink = open_log(log, command) if log else None
    try:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        assert child.stdout is not None
        while chunk := os.read(child.stdout.fileno(), 1 << 16):
            if sink:
                sink.write(chunk)
            new = decoder.decode(chunk)
            text = (text + new)[-keep:]
            if on_line:
                *lines, unfinished = (unfinished + new).split("\n")
                for line in lines:
                    on_line(line)
            if parse and on_progress and (progress := parse(text[-_WINDOW:])):
                on_progress(*progress)
        status = child.wait()
    except BaseException:
        _stop_tree(child, grace_s)
        raise
    finally:
        if child.stdout:
            child.stdout.close()
        if sink:
            sink.close()
    if status != 0:
        raise failure(what, command, status, text=text, log=log, hint=hint)
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
        raise failure(what, command, status, text="", log=None, hint="")


def start_beside(command: list[str], *, what: str, hint: str, env: Mapping[str, str | None], sink: IO[bytes]) -> Child:
    """Start ``command`` in a session of its own, its output in ``sink``; for ``service`` alone, which ends it."""
    how = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": subprocess.STDOUT, "start_new_session": True}
    return _start(command, what=what, hint=hint, env=_environment(env), **how)


def shown(argv: Sequence[str | Path]) -> str:
    """``argv`` as one line that a shell would take."""
    return shlex.join(str(part) for part in argv)


def prepended(variable: str, folder: Path) -> str:
    """The search path in an environment variable with ``folder`` before what it holds."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get(variable))))


def open_log(log: Path, command: list[str]) -> IO[bytes]:
    """``log``, to be appended to, with the command line in it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sink = log.open("ab", buffering=0)
    sink.write(f"$ {shown(command)}\n".encode())
    return sink


def failure(what: str, command: list[str], status: int, *, text: str, log: Path | None, hint: str) -> FoundryError:
    """The error of a child that ended with ``status``: CommandError, or MissingError where the disk is full."""
    evidence = evidence_of(command, text, log)
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


def evidence_of(command: list[str], text: str, log: Path | None) -> str:
    """The last lines, the command, and where all of it stands."""
    tail = "\n".join(text.replace("\r", "\n").splitlines()[-TAIL_LINES:])
    return f"{tail}\n$ {shown(command)}" + (f"\nlog: {log}" if log else "")


def parse_counter(recent: str) -> tuple[int, int] | None:
    """The last ``[n/m]``, as ninja, llama-quantize and the demo model's training print it."""
    found = re.findall(r"\[\s*(\d+)\s*/\s*(\d+)\]", recent)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    kept = {
        name: value for name, value in {**OPENMP_DEFAULTS, **CUDA_DEFAULTS, **os.environ}.items() if name not in changes
    }
    return kept | {name: value for name, value in changes.items() if value is not None}


def _start(command: list[str], *, what: str, hint: str, **how: Any) -> Child:
    try:
        return subprocess.Popen(command, **how)
    except FileNotFoundError as error:
        raise MissingError(
            f"{what}: {command[0]} is not there", evidence=str(error), hint=hint or "run `./inv build`"
        ) from error
    except OSError as error:
        raise CommandError(f"{what}: {command[0]} cannot be started", evidence=str(error), hint=hint) from error


def _stop_tree(child: Child, grace_s: float = GRACE_S) -> None:
    """SIGINT to the child's tree, a time of grace, then SIGKILL to what is left; a second interrupt ends the grace."""
    try:
        root = psutil.Process(child.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        child.wait()
        return
    left = family
    try:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=grace_s)
    finally:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        child.wait()
