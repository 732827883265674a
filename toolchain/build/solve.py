"""Before a build: can it work here, and with how many jobs?"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.base.errors import UsageError
from toolchain.base.machine import Machine
from toolchain.build.cuda import CudaChoice

# Sampled over a whole build of the default pin with gcc 12: no compiler was larger than 0.63 GB
# (cpp-httplib). The rest is room for other compilers and the system.
RAM_PER_JOB_BYTES = 1 << 30

# Sampled over a CUDA build of the default pin for one architecture (nvcc 13.0): cicc and cudafe++ 0.67 GB each at
# most, two jobs together 2.05 GB. An nvcc works its architectures off one after the other.
RAM_PER_NVCC_BYTES = 2 << 30

# Measured on the default pin: 65 MB of objects, 22 MB installed, 60 MB for the wheel's staging.
DISK_BYTES = 1 << 29


# One architecture: 150 MB of objects, 67 MB of library, and as much in the wheel's staging.
DISK_PER_CUDA_ARCH_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """How many compilers run at once, and why."""

    count: int
    reason: str


def choose_jobs(machine: Machine, asked: int | None, *, cuda: bool = False) -> Jobs:
    """The jobs asked for, else one per usable CPU as far as free memory carries them."""
    per_job = RAM_PER_NVCC_BYTES if cuda else RAM_PER_JOB_BYTES
    if asked is not None:
        if asked < 1:
            raise UsageError(f"--jobs {asked}: at least 1 is needed")
        return Jobs(count=asked, reason="asked for")
    by_ram = max(1, machine.available_bytes // per_job)
    if by_ram < machine.usable_cpus:
        free = machine.available_bytes / 2**30
        return Jobs(count=by_ram, reason=f"{free:.1f} GiB of memory is free, a compiler may take {per_job >> 30}")
    quota = f", cgroup quota {machine.quota:g}" if machine.quota is not None else ""
    return Jobs(count=machine.usable_cpus, reason=f"{machine.cpus} CPUs{quota}")


def disk_bytes(cuda: CudaChoice | None) -> int:
    """Free disk that a build needs before it starts."""
    return DISK_BYTES + (DISK_PER_CUDA_ARCH_BYTES * len(cuda.archs) if cuda else 0)
