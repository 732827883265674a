"""Run the product as its users do: `inv` and `python -m runtime` as child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LONG_S = 1800  # a bound against hanging, not an expectation
PATIENCE_S = 120  # the same for what takes seconds


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Our environment with ``changes``; None takes a variable away."""
    changed = {**os.environ, **(changes or {})}
    return {name: value for name, value in changed.items() if value is not None}


def inv_argv(*arguments: str | Path) -> list[str]:
    """What `./inv ARGUMENTS` executes once the environment stands."""
    return [sys.executable, "tasks.py", *map(str, arguments)]


def inv(*arguments: str | Path, env: Mapping[str, str | None] | None = None) -> subprocess.CompletedProcess[str]:
    return run(inv_argv(*arguments), env=env)


def run(argv: list[str], *, env: Mapping[str, str | None] | None = None) -> subprocess.CompletedProcess[str]:
    """A child in the project's folder to its end, whatever its status, with both streams kept."""
    return subprocess.run(
        argv,
        cwd=ROOT,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def runtime(
    environment: Mapping[str, str], *arguments: object, given: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """``python -m runtime ARGUMENTS`` with ``given`` on stdin and no variables but ``environment``, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "runtime", *map(str, arguments)],
        input=given,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        **options,
    )


def json_without_processes(statements: str) -> dict[str, Any]:
    """The object that ``statements`` print, run in a Python that fails if any process is started.

    Counted by the interpreter's own audit events, which every way to start a process raises.
    """
    program = (
        "import sys\nfrom pathlib import Path\nstarted = []\n"
        "names = ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'os.exec', 'os.system')\n"
        "sys.addaudithook(lambda event, args: started.append(event) if event in names else None)\n"
        f"{statements}\nassert not started, started\n"
    )
    done = run([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def inv_json(*arguments: str | Path, env: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """The one object that `inv ARGUMENTS --json` prints on stdout; the task must succeed."""
    done = inv(*arguments, "--json", env=env)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def leftovers(folder: Path) -> list[Path]:
    """Everything below ``folder`` that a stopped run must not leave, or only until the next one."""
    return sorted(folder.rglob(".partial-*")) if folder.exists() else []


ON_SMALL_DISK = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
place=$2 after=$3 listing=$4; shift 4
"$@" & pid=$!
if [ -n "$after" ]; then # fill the disk once such a file is there
    while kill -0 $pid 2>/dev/null && [ -z "$(find "$place" -name "$after")" ]; do sleep 0.02; done
    head -c 1G /dev/zero >"$place/filler" 2>/dev/null
fi
wait $pid; status=$?
(cd "$place" && find . -type f ! -name filler -exec sha256sum {} +) >"$listing"
exit $status
"""


def on_small_disk(
    size: str, place: Path, argv: list[str], *, env: Mapping[str, str | None], fill_after: str = ""
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run ``argv`` with a real file system of ``size`` mounted at ``place``, in a mount namespace of its own.

    With ``fill_after`` the disk is filled to the brim once a file of that name pattern is there. Returns what
    ran and the SHA-256 of every file that was left, by its path below ``place``.
    """
    place.mkdir(parents=True, exist_ok=True)
    listing = place.with_name(place.name + ".listing")
    shell = ["sh", "-c", ON_SMALL_DISK, "sh", size, str(place), fill_after, str(listing), *argv]
    done = run(["unshare", "--user", "--map-root-user", "--mount", *shell], env=env)
    assert done.returncode != 99, f"no user namespaces here, which this test needs: {done.stderr}"
    left = [line.split("  ./", 1) for line in listing.read_text().splitlines()]
    return done, {name: digest for digest, name in left}
