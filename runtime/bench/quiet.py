"""Whether the machine had anything else to do while it was measured."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

import psutil

from runtime.tune.neighbours import Neighbours, our_cpus

_OTHERS: Final = 0.10
"""CPUs' worth of other work, as a share of ours, beyond which figures are called unsure."""


class Watch:
    """What others did on our CPUs since it was made."""

    def __init__(self) -> None:
        self._neighbours = Neighbours()

    def warnings(self) -> tuple[str, ...]:
        """What makes the figures unsure, one sentence each."""
        found = []
        others, cpus = self._neighbours.cpus(), len(our_cpus() or range(os.cpu_count() or 1))
        if others > _OTHERS * cpus:
            found.append(f"other processes kept {others:.1f} of our {cpus} CPUs busy: measure again on a quiet machine")
        with suppress(AttributeError, OSError):  # psutil has no batteries on some systems
            battery = psutil.sensors_battery()
            if battery is not None and battery.power_plugged is False:
                found.append("this machine runs on its battery, which may slow it down")
        return tuple(found)
