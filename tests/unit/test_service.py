"""A child that runs beside us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from toolchain.base.errors import CommandError, MissingError
from toolchain.base.service import Service, serving, start_service

PATIENCE_S = 30


def until(found: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def shell(script: str, log: Path) -> Service:
    return start_service(["/bin/sh", "-c", script], what="test", log=log)


def test_service_tells_its_last_words_and_leaves_no_grandchild(tmp_path: Path) -> None:
    service = shell(
        "sleep 1000 & echo $! >pid; echo alas >&2; exit 3".replace(">pid", f">{tmp_path}/pid"), tmp_path / "log"
    )
    until(lambda: service.status() is not None, "it does not end")
    error = service.failed()
    assert isinstance(error, CommandError)
    assert "status 3" in error.message
    assert "alas" in error.evidence
    assert str(tmp_path / "log") in error.evidence
    grandchild = int((tmp_path / "pid").read_text())
    until(lambda: not psutil.pid_exists(grandchild) or _is_dead(grandchild), "a grandchild is left")


def _is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_service_ends_when_asked_and_at_once_when_killed(tmp_path: Path) -> None:
    service = shell("trap 'echo asked; exit 0' TERM; echo up; while :; do sleep 0.05; done", tmp_path / "log")
    until(lambda: service.output().endswith("up\n"), "it does not start")
    service.ask_to_end()
    until(lambda: service.status() is not None, "it does not end")
    assert service.status() == 0
    assert "asked" in service.output()
    deaf = shell("trap '' TERM; echo up; while :; do sleep 0.05; done", tmp_path / "deaf")
    until(lambda: deaf.output().endswith("up\n"), "it does not start")
    deaf.ask_to_end()
    deaf.kill()
    assert deaf.status() == -signal.SIGKILL


def test_service_has_a_session_of_its_own_and_its_command_in_ps(tmp_path: Path) -> None:
    service = shell("sleep 1000", tmp_path / "log")
    try:
        until(lambda: psutil.Process(service.pid).cmdline() == ["/bin/sh", "-c", "sleep 1000"], "another command runs")
        assert os.getsid(service.pid) == service.pid != os.getsid(0)
    finally:
        service.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a signal of the parent's death")
def test_service_dies_with_us_whatever_kills_us(tmp_path: Path) -> None:
    program = (
        "import pathlib, time\nfrom toolchain.base.service import start_service\n"
        f"argv, log = ['/bin/sh', '-c', 'echo up; sleep 1000'], pathlib.Path({str(tmp_path / 'log')!r})\n"
        "service = start_service(argv, what='t', log=log)\n"
        "while not service.output().endswith('up\\n'): time.sleep(0.01)\n"
        "print(service.pid, flush=True)\ntime.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not psutil.pid_exists(child) or _is_dead(child), "the child outlives its parent")


def test_missing_program_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="not there"):
        start_service([tmp_path / "none"], what="test", log=tmp_path / "log")


def test_what_runs_beside_the_body_ends_with_it(tmp_path: Path) -> None:
    def pid_of(text: str) -> str | None:
        return text.split()[1] if text.endswith("\n") else None

    argv = ["/bin/sh", "-c", "echo pid $$; sleep 1000; true"]
    with serving(argv, what="test", log=tmp_path / "log", ready=pid_of, timeout_s=PATIENCE_S) as pid:
        assert psutil.Process(int(pid)).cmdline() == argv
    assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize(
    ("script", "limit_s", "said"), [("echo alas; exit 3", 30, "status 3"), ("echo alas; sleep 1000", 0, "not ready")]
)
def test_what_is_never_ready_is_told_with_its_last_words(
    tmp_path: Path, script: str, limit_s: float, said: str
) -> None:
    (tmp_path / "log").write_text("of another one\n")
    seen = tmp_path / "seen"

    def ready(text: str) -> str | None:
        seen.write_text(text)
        return None

    argv = ["/bin/sh", "-c", script]
    with (
        pytest.raises(CommandError, match=said) as failure,
        serving(argv, what="test", log=tmp_path / "log", ready=ready, timeout_s=limit_s),
    ):
        raise AssertionError
    assert "another" not in seen.read_text() + failure.value.evidence
    assert "another" in (tmp_path / "log").read_text()
