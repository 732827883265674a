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


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Our environment with ``changes``; None takes a variable away."""
    changed = {**os.environ, **(changes or {})}
    return {name: value for name, value in changed.items() if value is not None}


def inv_argv(*arguments: str | Path) -> list[str]:
    """What `./inv ARGUMENTS` executes once the environment stands."""
    return [sys.executable, "tasks.py", *map(str, arguments)]


def inv(*arguments: str | Path, env: Mapping[str, str | None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        inv_argv(*arguments),
        cwd=ROOT,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


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
