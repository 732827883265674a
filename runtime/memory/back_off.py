"""A load that runs out of memory in spite of its plan is planned again with less, once, and remembered.

What failed tells how much less: a compute buffer lacks little (weights and cache lay there already), a cache half of
itself, weights a quarter of everything. The search then decides what gives way: layers, micro-batch, cache type, or a
context that nobody asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias, TypeVar

from runtime.memory.here import Planned
from runtime.memory.learned import device_of_buffer
from runtime.memory.plan import DevicePlan, MemoryPlan
from runtime.settings import Settings
from toolchain.base import console
from toolchain.base.errors import MemoryFitError

Stage: TypeAlias = Literal["weights", "cache", "compute"]
Loaded = TypeVar("Loaded")

_BUFFER: Final = re.compile(r"failed to allocate (\S+) buffer of size (\d+)")
_SHARES: Final[dict[Stage, float]] = {"weights": 0.25, "cache": 0.15, "compute": 0.10}


def load_with_back_off(
    planned: Planned,
    settings: Settings,
    load: Callable[[Settings], Loaded],
    *,
    settle: Callable[[MemoryPlan], Settings],
    log_lines: Callable[[Loaded], Sequence[str]],
) -> tuple[Loaded, Settings]:
    """What ``load`` gives for ``settings``, or for what ``settle`` makes of a plan with less; and those settings.

    What the load taught is kept for the next plan. Raises the first MemoryFitError where no plan takes less, else
    the second; everything else that ``load`` raises passes.
    """
    try:
        loaded = load(settings)
    except MemoryFitError as first:
        device, most_bytes = still_possible(first, planned.plan)
        planned = planned.again(planned.lessons.with_shortfall(device.name, most_bytes))
        planned.lessons.keep()
        fewer = settle(planned.plan)
        changed = _changes(settings, fewer)
        if not planned.plan.fits or not changed:
            first.hint = planned.plan.instead or first.hint
            raise
        console.warn(f"{first.message} after all; loading once more with {changed}")
        settings, loaded = fewer, load(fewer)
    lessons = planned.learned(settings, log_lines(loaded))
    if lessons != planned.lessons:
        lessons.keep()
    return loaded, settings


def still_possible(failure: MemoryFitError, plan: MemoryPlan) -> tuple[DevicePlan, int]:
    """The device that ran out, and the bytes to ask of it at most from now on."""
    told = f"{failure.message}\n{failure.evidence}"
    buffers = _BUFFER.findall(told)
    number, size = (device_of_buffer(buffers[0][0]), int(buffers[0][1])) if buffers else (len(plan.devices) - 1, 0)
    device = plan.devices[min(number, len(plan.devices) - 1)]
    stage = stage_of(told)
    share = device.used_bytes * _SHARES[stage]
    return device, device.used_bytes - int(max(share, size / 2 if stage != "weights" else 0))


def stage_of(told: str) -> Stage:
    """What could not be allocated, by the library's words (llama-context.cpp, llama-kv-cache.cpp)."""
    if re.search(r"compute|gallocr|graph", told):
        return "compute"
    return "cache" if re.search(r"kv cache|rs cache|context", told) else "weights"


def _changes(before: Settings, after: Settings) -> str:
    """Such as ``n_ctx 2048 (was 4096)``."""
    names = [entry.name for entry in after.entries if entry.value != before[entry.name].value]
    return ", ".join(f"{name} {after[name].value} (was {before[name].value})" for name in names)
