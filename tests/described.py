"""A machine and a build described in words, for what depends on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.base.machine import Machine
from toolchain.build.toolchain import Toolchain

GIB = 1 << 30
PLAIN = Machine(
    system="Linux",
    arch="x86_64",
    cpu_model="described",
    cpu_flags=frozenset({"avx2"}),
    cpus=8,
    cores=4,
    quota=None,
    ram_bytes=64 * GIB,
    available_bytes=64 * GIB,
    gpus=(),
)


def machine(**changes: Any) -> Machine:
    """Eight CPUs, 64 GiB, no GPU, but for ``changes``."""
    return replace(PLAIN, **changes)


def toolchain(root: Path, **changes: Any) -> Toolchain:
    """A build in ``root`` with nothing in it, but for ``changes``."""
    plain = Toolchain(
        id="described",
        root=root,
        commit="",
        backends=("CPU",),
        wheel_name="",
        wheel_version="",
        source="",
        options=(),
        compilers=(),
        seconds=0.0,
    )
    return replace(plain, **changes)
