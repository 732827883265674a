"""A plan as people read it: settings with their reasons, a bar for each memory, what to expect, and why."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Final

from runtime.memory.devices import Device
from runtime.memory.plan import DevicePlan, MemoryPlan
from runtime.memory.speed import Speed
from runtime.settings import Settings
from toolchain.base.console import format_bytes
from toolchain.base.errors import MemoryFitError

_WIDTH: Final = 40
# letter, meaning, colour on a terminal (SGR)
_PARTS: Final = (
    ("w", "weights", 34),
    ("e", "experts", 36),
    ("k", "cache", 32),
    ("c", "compute", 33),
    ("p", "projector", 35),
    ("a", "adapters", 95),
    ("m", "margin", 90),
)


def plan_lines(plan: MemoryPlan, settings: Settings, speed: Speed, *, plain: bool = False) -> Iterator[str]:
    """All of it, line by line; bars in colour where stdout is a terminal, unless ``plain``."""
    yield from _settings_lines(settings)
    yield ""
    coloured = not plain and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = max(len(device.name) for device in plan.devices)
    for device in plan.devices:
        yield f"{device.name:<{width}}  {bar(device, coloured=coloured)}  {_figures(device)}"
    used = {name for device in plan.devices for name, size in _sizes(device) if size}
    yield " " * width + "  " + "  ".join(_key(*part, coloured) for part in _PARTS if part[1] in used)
    yield ""
    yield f"expect {rate(speed.generation_tps)} t/s for generation, {rate(speed.prompt_tps)} t/s for prompts"
    yield f"  {speed.basis}"
    source = "the library's own" if plan.exact else "computed from the header"
    yield f"  sizes: {source}"
    for note in plan.notes:
        yield f"- {note}"


def plan_json(plan: MemoryPlan, settings: Settings, speed: Speed) -> dict[str, Any]:
    """The contract of DESIGN section 3, and more."""
    return {
        "settings": settings.as_json(),
        "devices": [device.as_json() for device in plan.devices],
        "fits": plan.fits,
        "speed": {"generation_tps": speed.generation_tps, "prompt_tps": speed.prompt_tps, "basis": speed.basis},
        "exact": plan.exact,
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "instead": plan.instead,
    }


def no_fit(name: str, plan: MemoryPlan) -> MemoryFitError:
    """The error of a plan that does not fit: what each memory would need and has, and what would fit."""
    lines = [
        f"{device.name}: {format_bytes(device.used_bytes)} needed ({_parts(device)}), "
        f"{format_bytes(max(0, device.free_bytes - device.margin_bytes))} to use "
        f"({format_bytes(device.free_bytes)} free, {format_bytes(device.margin_bytes)} kept)"
        for device in plan.devices
    ]
    return MemoryFitError(
        f"{name} does not fit in memory with {_contexts(plan)} tokens",
        evidence="\n".join(lines),
        hint=plan.instead or "take a smaller model",
    )


def _contexts(plan: MemoryPlan) -> str:
    """Such as ``a context of 4096``, or ``4 contexts of 4096``."""
    many = plan.demand.n_ctx // plan.demand.n_ctx_each
    return f"{many} contexts of {plan.demand.n_ctx_each}" if many > 1 else f"a context of {plan.demand.n_ctx}"


def bar(device: DevicePlan, *, coloured: bool) -> str:
    """The parts of what is free of ``device``, as wide as they are: ``[wwwwwkkcm....]``."""
    whole = max(device.free_bytes, device.used_bytes + device.margin_bytes, 1)
    text, filled, done = "", 0, 0
    for (letter, _, colour), (_, size) in zip(_PARTS, _sizes(device), strict=True):
        filled += size
        cells = round(_WIDTH * filled / whole) - done
        done += cells
        text += f"\x1b[{colour}m{'█' * cells}\x1b[0m" if coloured else letter * cells
    return f"[{text}{('░' if coloured else '.') * (_WIDTH - done)}]"


def rate(tps: float) -> str:
    """Two significant figures: it is an expectation."""
    return f"{float(f'{tps:.2g}'):g}" if tps < 1000 else f"{round(tps, -2):.0f}"


def where(plan: MemoryPlan, devices: tuple[Device, ...]) -> str:
    """Where a model would lie: ``GPU``, ``28/33 layers``, ``8 layers' experts on host``, ``CPU`` or ``no``."""
    layout = plan.choice.layout
    if not plan.fits:
        return "no"
    if not layout.n_gpu_layers:
        return "CPU"
    if layout.is_whole:
        return "all on GPU"
    if layout.n_gpu_layers == layout.n_all:
        return f"experts of {layout.host_experts} layers on host"
    return f"{layout.n_gpu_layers} of {layout.n_all} layers on GPU"


def _settings_lines(settings: Settings) -> Iterator[str]:
    rows = [(entry.name, str(entry.value) or "-", entry.origin, entry.reason) for entry in settings.entries]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, value, origin, reason in rows:
        yield f"{name:<{widths[0]}}  {value:>{widths[1]}}  {origin:<{widths[2]}}  {reason}".rstrip()


def _sizes(device: DevicePlan) -> list[tuple[str, int]]:
    return [
        ("weights", device.weights_bytes - device.experts_bytes),
        ("experts", device.experts_bytes),
        ("cache", device.kv_bytes),
        ("compute", device.compute_bytes),
        ("projector", device.mmproj_bytes),
        ("adapters", device.adapters_bytes),
        ("margin", device.margin_bytes),
    ]


def _parts(device: DevicePlan) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in _sizes(device)[:-1] if size)


def _figures(device: DevicePlan) -> str:
    left = (
        f"{format_bytes(device.left_bytes)} left"
        if device.left_bytes >= 0
        else f"{format_bytes(-device.left_bytes)} missing"
    )
    return f"{format_bytes(device.used_bytes)} of {format_bytes(device.free_bytes)} free, {left}"


def _key(letter: str, name: str, colour: int, coloured: bool) -> str:
    return f"\x1b[{colour}m█\x1b[0m {name}" if coloured else f"{letter} {name}"
