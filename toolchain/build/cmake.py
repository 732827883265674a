"""Pure builders of cmake's command lines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from toolchain.base.errors import MissingError
from toolchain.base.machine import Compiler
from toolchain.build.options import BuildOptions


def find_tool(name: str) -> Path:
    """cmake or ninja: the one beside our Python, else on PATH."""
    beside = Path(sys.executable).parent / name
    if beside.is_file():
        return beside
    if found := shutil.which(name):
        return Path(found)
    raise MissingError(f"{name} is not installed", hint=f"run `./inv`, or `pip install {name}`")


def configure_argv(
    *, cmake: Path, ninja: Path, source: Path, build: Path, options: BuildOptions, c: Compiler, cxx: Compiler
) -> tuple[str, ...]:
    """``cmake -S source -B build`` with every choice named."""
    return (
        *(str(cmake), "-G", "Ninja", "-S", str(source), "-B", str(build)),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_C_COMPILER={c.path}",
        f"-DCMAKE_CXX_COMPILER={cxx.path}",
        *options.argv(),
    )


def build_argv(*, cmake: Path, build: Path, jobs: int, targets: Sequence[str] = ()) -> tuple[str, ...]:
    """Everything, or ``targets`` alone."""
    only = ("--target", *targets) if targets else ()
    return (str(cmake), "--build", str(build), "--parallel", str(jobs), *only)


def install_argv(*, cmake: Path, build: Path, prefix: Path) -> tuple[str, ...]:
    return (str(cmake), "--install", str(build), "--prefix", str(prefix))
