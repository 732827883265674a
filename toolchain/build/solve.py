"""Before a build: can it work here, and with how many jobs?"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.base.errors import UsageError
from toolchain.base.machine import Machine

# The largest of llama.cpp's translation units (the server and the vendored JSON headers) peak near 1 GiB in
# gcc 12 at -O3; the rest is room for the linker and the system.
RAM_PER_JOB_BYTES = 3 << 29

# Measured on the default pin: 65 MB of objects, 22 MB installed, 60 MB for the wheel's staging.
DISK_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """How many compilers run at once, and why."""

    count: int
    reason: str


def choose_jobs(machine: Machine, asked: int | None) -> Jobs:
    """The jobs asked for, else one per usable CPU as far as free memory carries them."""
    if asked is not None:
        if asked < 1:
            raise UsageError(f"--jobs {asked}: at least 1 is needed")
        return Jobs(count=asked, reason="asked for")
    by_ram = max(1, machine.available_bytes // RAM_PER_JOB_BYTES)
    if by_ram < machine.usable_cpus:
        free = machine.available_bytes / 2**30
        return Jobs(count=by_ram, reason=f"{free:.1f} GiB of memory is free, a compiler takes up to 1.5")
    quota = f", cgroup quota {machine.quota:g}" if machine.quota is not None else ""
    return Jobs(count=machine.usable_cpus, reason=f"{machine.cpus} CPUs{quota}")
