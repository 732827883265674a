"""Whether the machine had anything else to do while it was measured."""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress
from typing import Final

import psutil

_OTHERS: Final = 0.10
"""CPUs' worth of other work, as a share of ours, beyond which figures are called unsure."""


class Watch:
    """What others did on our CPUs since it was made."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = _clocks()

    def other_cpus(self) -> float:
        """CPUs' worth of work that neither we nor our children did (a hypervisor's steal counts).

        0.0 where the kernel does not tell. Children count once they have ended.
        """
        wall, busy, own = _clocks()
        seconds = wall - self._wall
        return max(0.0, (busy - self._busy) - (own - self._own)) / seconds if seconds > 0 else 0.0

    def warnings(self) -> tuple[str, ...]:
        """What makes the figures unsure, one sentence each."""
        found = []
        others, cpus = self.other_cpus(), len(_our_cpus() or range(os.cpu_count() or 1))
        if others > _OTHERS * cpus:
            found.append(f"other processes kept {others:.1f} of our {cpus} CPUs busy: measure again on a quiet machine")
        with suppress(AttributeError, OSError):  # psutil has no batteries on some systems
            battery = psutil.sensors_battery()
            if battery is not None and battery.power_plugged is False:
                found.append("this machine runs on its battery, which may slow it down")
        return tuple(found)


def _our_cpus() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _clocks() -> tuple[float, float, float]:
    """Seconds: wall, busy on our CPUs (all CPUs where no mask is known), busy with us and our ended children."""
    busy, mask = 0.0, _our_cpus()
    with suppress(OSError, RuntimeError):
        for number, times in enumerate(psutil.cpu_times(percpu=True)):
            if mask is None or number in mask:
                # A guest's time is in user too (proc(5)).
                idle = times.idle + getattr(times, "iowait", 0.0)
                busy += sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), busy, time.process_time() + children.ru_utime + children.ru_stime
