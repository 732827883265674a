"""Who else works on our CPUs while something is measured."""

from __future__ import annotations

import os
import resource
import time
from typing import Final

import psutil

from toolchain.base.machine import Machine

_SLACK_CPUS: Final = 0.25  # of other work that is not taken for a crowd


def crowded(machine: Machine, threads: int, others: float) -> bool:
    """Whether other work on ``others`` CPUs left fewer than the ``threads`` that were measured."""
    return others > max(0, machine.cpus - threads) + _SLACK_CPUS


def our_cpus() -> set[int] | None:
    """Numbers of the CPUs that we may run on; None where the system has no masks."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


class Neighbours:
    """What other processes do on our CPUs while we measure."""

    def __init__(self) -> None:
        self._began = self._look()

    def cpus(self) -> float:
        """CPUs' worth of others' work (and of what a hypervisor took) since the beginning; 0.0 where nobody says.

        Children count as ours once they have ended.
        """
        wall, busy, own = (late - early for late, early in zip(self._look(), self._began, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0

    @staticmethod
    def _look() -> tuple[float, float, float]:
        """Seconds: wall, busy on our CPUs (on all where no mask is known), busy with us and our ended children."""
        busy = 0.0
        try:
            mask = our_cpus()
            for number, times in enumerate(psutil.cpu_times(percpu=True)):
                if mask is None or number in mask:
                    # psutil counts a guest's time in user too (proc(5)).
                    idle = times.idle + getattr(times, "iowait", 0.0)
                    busy += sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        except (OSError, RuntimeError):
            busy = 0.0
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic(), busy, time.process_time() + children.ru_utime + children.ru_stime
