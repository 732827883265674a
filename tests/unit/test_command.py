"""Children: their progress, their failures, and that none outlives an interrupt."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.front_door import ROOT
from toolchain.base import command
from toolchain.base.errors import CommandError, MissingError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_progress_is_read_from_counters() -> None:
    seen: list[tuple[int, int]] = []
    code = "for i in range(1, 4): print(f'[{i}/3] step', flush=True)"
    command.run(python(code), what="counting", parse=command.parse_counter, on_progress=lambda *n: seen.append(n))
    assert seen[-1] == (3, 3)


def test_a_failure_shows_the_last_lines_the_command_and_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    code = "import sys\nfor i in range(50): print('line', i)\nsys.exit(7)"
    with pytest.raises(CommandError, match="status 7") as caught:
        command.run(python(code), what="failing", log=log)
    assert "line 49" in caught.value.evidence
    assert "line 30\n" in caught.value.evidence
    assert "line 29\n" not in caught.value.evidence
    assert str(log) in caught.value.evidence
    assert "line 0\n" in log.read_text()


def test_a_killed_child_is_told_by_its_signal() -> None:
    with pytest.raises(CommandError, match="SIGKILL"):
        command.run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), what="dying")


def test_a_child_that_fills_the_disk_is_told_so() -> None:
    with pytest.raises(MissingError, match="disk is full"):
        command.run(python("open('/dev/full', 'w').write('x' * 9999)"), what="writing")


def test_a_missing_program_is_a_missing_error() -> None:
    with pytest.raises(MissingError):
        command.run(["no-such-program-anywhere"], what="trying")


def test_a_missing_program_for_our_own_terminal_is_a_missing_error() -> None:
    with pytest.raises(MissingError):
        command.attach(["no-such-program-anywhere"], what="trying")


def test_output_that_is_not_utf8_does_no_harm() -> None:
    code = "import os; os.write(1, b'caf\\xe9 \\xff\\n')"
    assert "caf" in command.run(python(code), what="printing").output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_takes_the_whole_tree_down(tmp_path: Path, how: signal.Signals) -> None:
    """The signal reaches only the parent; the grandchild ignores SIGINT, as a stubborn tool would."""
    grandchild = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    parent = (
        "import signal, sys\nfrom toolchain.base import command\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"command.run([sys.executable, '-c', {child!r}], what='waiting')\n"
    )
    running = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    family: list[psutil.Process] = []
    while len(family) < 2 and running.poll() is None:
        time.sleep(0.1)
        family = psutil.Process(running.pid).children(recursive=True)
    time.sleep(0.3)
    running.send_signal(how)
    running.communicate(timeout=60)
    assert running.returncode != 0
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_each_whole_line_is_told_once_wherever_the_output_is_cut() -> None:
    parts = (b"a\nb", b"c\xc3", b"\xa9\n\n", b"rest")
    code = f"import os, time\nfor part in {parts}: os.write(1, part); time.sleep(0.05)"
    seen: list[str] = []
    command.run(python(code), what="talking", on_line=seen.append)
    assert seen == ["a", "bcé", ""]


@pytest.mark.parametrize("grace_s", [0, 60])
def test_an_interrupted_child_has_its_grace_to_write_what_it_has(tmp_path: Path, grace_s: int) -> None:
    place = tmp_path / "written"
    code = (
        "import pathlib, time\ntry:\n    print('ready', flush=True)\n    time.sleep(300)\n"
        f"except KeyboardInterrupt:\n    time.sleep(0.5)\n    pathlib.Path({str(place)!r}).touch()"
    )

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.run(python(code), what="learning", on_line=interrupt, grace_s=grace_s)
    assert place.exists() == bool(grace_s)


def test_a_second_interrupt_ends_the_grace(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    child = (
        "import os, pathlib, signal, time\n"
        f"signal.signal(signal.SIGINT, lambda *_: pathlib.Path({str(heard)!r}).write_text(f'{{os.getpid()}}.'))\n"
        "print('ready', flush=True)\nwhile True: time.sleep(300)"
    )
    parent = (
        "import sys\nfrom toolchain.base import command\n"
        f"command.run([sys.executable, '-c', {child!r}], what='waiting', grace_s=300, on_line=lambda _: sys.exit())"
    )
    running = subprocess.Popen(python(parent), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (heard.exists() and heard.read_text().endswith(".")):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) != 0
    assert not psutil.pid_exists(int(heard.read_text()[:-1]))
