"""Threads for this machine, from what the kernel grants: CPU quota, affinity, physical cores.

Generation gets one thread per physical core, prompt processing (which is bound by arithmetic and not by
memory) one per logical CPU; neither more than the cgroup's quota pays for.
"""

from __future__ import annotations

from runtime.settings import Setting
from toolchain.base.machine import Machine


def tuned_threads(machine: Machine) -> tuple[Setting, Setting]:
    """``n_threads`` and ``n_threads_batch`` with their reasons."""
    generation, batch = machine.compute_threads, machine.usable_cpus
    return (
        Setting(name="n_threads", value=generation, origin="tuned", reason=_reason(machine, generation)),
        Setting(name="n_threads_batch", value=batch, origin="tuned", reason=_reason(machine, batch)),
    )


def _reason(machine: Machine, threads: int) -> str:
    """Such as ``2 of 64 CPUs: cgroup quota 2.0``."""
    if threads == machine.cpus:
        return f"all {machine.cpus} CPUs that we may use" if machine.cpus > 1 else "the one CPU that we may use"
    share = f"{threads} of {machine.cpus} CPUs"
    if machine.quota is not None and threads == machine.usable_cpus:
        return f"{share}: cgroup quota {machine.quota:.1f}"
    return f"{share}: one per physical core"
