"""A machine described in words, for what depends on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from toolchain.base.machine import Machine

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
