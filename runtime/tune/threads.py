"""Threads and micro-batch for this machine as settings: what the kernel grants, or what was measured.

The first answer is arithmetic (``base/topology.py``): generation gets a thread per fast physical core, a prompt
one per fast logical CPU, neither more than the quota pays for. A measurement overrules it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from runtime.settings import Setting, Settings
from runtime.tune.record import TUNED, TunedName, Tuning, wanted
from runtime.tune.search import SAME, UBATCH_SAME, Found
from toolchain.base.machine import Machine
from toolchain.base.topology import Threads

_OF: Final = {"n_threads": "generation_threads", "n_threads_batch": "prompt_threads"}


def tuned_threads(machine: Machine) -> tuple[Setting, Setting]:
    """``n_threads`` and ``n_threads_batch`` with their reasons, from what the kernel grants."""
    generation, prompt = machine.generation_threads, machine.prompt_threads
    return (
        Setting(name="n_threads", value=generation.count, origin="tuned", reason=generation.reason),
        Setting(name="n_threads_batch", value=prompt.count, origin="tuned", reason=prompt.reason),
    )


def as_settings(tuning: Tuning | None, machine: Machine) -> tuple[Setting, ...]:
    """What ``tuning`` found, with its figures as reasons; the computed threads where it found nothing.

    ``n_ubatch`` is among them only where it was measured.
    """
    computed: dict[str, Setting] = {setting.name: setting for setting in tuned_threads(machine)}
    if tuning is not None:
        for name, found in tuning.found.items():
            reason = _reason(name, found, tuning, machine)
            computed[name] = Setting(name=name, value=found.value, origin="tuned", reason=reason)
    return tuple(computed[name] for name in TUNED if name in computed)


def apply(settings: Settings, tuning: Tuning | None, machine: Machine) -> Settings:
    """``settings`` with what was tuned in the places that recipe, environment and flags leave open."""
    free = wanted(settings)
    most = settings.number("n_batch")
    new: dict[str, Setting] = {
        setting.name: replace(setting, value=min(int(setting.value), most)) if setting.name == "n_ubatch" else setting
        for setting in as_settings(tuning, machine)
        if setting.name in free
    }
    return Settings(entries=tuple(new.get(entry.name, entry) for entry in settings.entries))


def thread_candidates(machine: Machine, start: int) -> tuple[int, ...]:
    """Numbers of threads worth a burst: every one on a small machine, else steps around ``start`` and the kinds.

    With a fraction of a CPU in the quota its upper end counts too.
    """
    most = machine.cpus if machine.quota is None else max(1, min(machine.cpus, math.ceil(machine.quota)))
    if most <= 4:
        return tuple(range(1, most + 1))
    around = (1, start // 4, start // 2, 3 * start // 4, start)
    granted = (machine.performance_cores, machine.performance_cpus, machine.cores, machine.usable_cpus, most)
    node = max(machine.node_cores, default=None)
    return tuple(sorted({min(each, most) for each in (*around, *granted, node) if each}))


def _reason(name: TunedName, found: Found, tuning: Tuning, machine: Machine) -> str:
    """Such as ``2 of 2 CPUs: measured 512 t/s against 301 with 1``."""
    measured = f"measured {shown_rate(found.rate(found.value))} t/s"
    others = [point for point in found.points if point.value != found.value]
    if name == "n_ubatch":
        what = f"{measured} for a prompt"
        start: Threads | None = None
    else:
        start = getattr(machine, _OF[name])
        assert isinstance(start, Threads)
        share = start.reason if start.count == found.value else f"{found.value} of {machine.cpus} CPUs"
        what = f"{share}: {measured}"
    if others:
        # Against what arithmetic said, else against the best of the others.
        other = next((p for p in others if start and p.value == start.count), max(others, key=lambda p: p.rate))
        same = UBATCH_SAME if name == "n_ubatch" else SAME
        alike = abs(other.rate / found.rate(found.value) - 1) <= same
        what += f"{', about as' if alike else ' against'} {shown_rate(other.rate)} with {other.value}"
    if not tuning.settled and name != "n_ubatch":
        what += f" (unsteady: other work on {tuning.others:.1f} CPUs, bursts off by {100 * tuning.noise:.0f} %)"
    return what


def shown_rate(rate: float) -> str:
    """Tokens/s with three digits at least."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"
