"""A load that runs out of memory in spite of its plan is planned again with less, once, and remembered.

What failed tells how much less: a compute buffer lacks little (weights and cache lay there already), a cache half of
itself, weights a quarter of everything. The search then decides what gives way: layers, micro-batch, cache type, or a
context that nobody asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeAlias, TypeVar

from runtime.memory.here import Planned
from runtime.memory.learned import device_of_buffer
from runtime.memory.plan import DevicePlan, MemoryPlan
from runtime.settings import Settings
from toolchain.base import console
from toolchain.base.errors import MemoryFitError

Stage: TypeAlias = Literal["weights", "cache", "compute"]
Loaded = TypeVar("Loaded")

_BUFFER: Final = re.compile(r"failed to allocate (\S+) buffer of size (\d+)")
_TAKE_MEMORY: Final = (
    *("n_ctx", "n_batch", "n_ubatch", "type_k", "type_v"),
    *("n_gpu_layers", "n_cpu_moe", "tensor_split"),
)
_SHARES: Final[dict[Stage, float]] = {"weights": 0.25, "cache": 0.15, "compute": 0.10}


@dataclass(frozen=True, kw_only=True)
class Started(Generic[Loaded]):
    """What was loaded, the settings that its context has in the end, and the library's log of making that context."""

    loaded: Loaded
    settings: Settings
    lines: Sequence[str]


def load_with_back_off(
    planned: Planned,
    settings: Settings,
    load: Callable[[Settings, Planned], Started[Loaded]],
    *,
    settle: Callable[[Planned], Settings],
) -> Loaded:
    """What ``load`` gives for ``settings`` by ``planned``, or for what ``settle`` makes of a plan with less.

    What the load taught is kept for the next plan. Raises the first MemoryFitError where no plan takes less, else
    the second; everything else that ``load`` raises passes.
    """
    try:
        started = load(settings, planned)
    except MemoryFitError as first:
        device, most_bytes = still_possible(first, planned.plan)
        planned = planned.again(planned.lessons.with_shortfall(device.name, most_bytes))
        planned.lessons.keep()
        fewer = settle(planned)
        changed = _changes(settings, fewer)
        if not planned.plan.fits or not changed:
            first.hint = planned.plan.instead or first.hint
            raise
        console.warn(f"{first.message} after all; loading once more with {changed}")
        started = load(fewer, planned)
    lessons = planned.learned(started.settings, started.lines).current()
    if lessons != planned.lessons:
        lessons.keep()
    return started.loaded


def still_possible(failure: MemoryFitError, plan: MemoryPlan) -> tuple[DevicePlan, int]:
    """The device that ran out, and the bytes to ask of it at most from now on."""
    buffers = _BUFFER.findall(failure.evidence)
    number, size = (device_of_buffer(buffers[0][0]), int(buffers[0][1])) if buffers else (len(plan.devices) - 1, 0)
    device = plan.devices[min(number, len(plan.devices) - 1)]
    stage = stage_of(failure.evidence)
    share = device.used_bytes * _SHARES[stage]
    return device, device.used_bytes - int(max(share, size / 2 if stage != "weights" else 0))


def stage_of(evidence: str) -> Stage:
    """What could not be allocated, by the library's words (llama-context.cpp, llama-kv-cache.cpp, llama-adapter.cpp).

    An adapter is loaded last, as a compute buffer is, and lacks as little.
    """
    if re.search(r"compute|gallocr|graph|lora", evidence):
        return "compute"
    return "cache" if re.search(r"kv cache|rs cache|context", evidence) else "weights"


def _changes(before: Settings, after: Settings) -> str:
    """Such as ``n_ctx 2048 (was 4096)``, of what takes memory; threads may change with it and free none."""
    names = [name for name in _TAKE_MEMORY if after[name].value != before[name].value]
    return ", ".join(f"{name} {after[name].value} (was {before[name].value})" for name in names)
