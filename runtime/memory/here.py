"""A plan for this machine with the installed build, and what is needed to plan again after a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.library_id import build_id
from runtime.memory.devices import Device, devices_here, knows_gpus, with_library_gpus
from runtime.memory.footprint import CUDA, BufferBytes, Demand, Placement, Traits, footprint, repacked_types
from runtime.memory.kernels import Build, installed_build
from runtime.memory.learned import Lessons, lessons_for, made_buffers
from runtime.memory.plan import MemoryPlan, Request, plan_memory
from runtime.memory.shape import shape_of
from runtime.memory.sizes import Ask
from runtime.settings import Setting, Settings, parse_split
from runtime.tune.bandwidth import recorded_bandwidth
from toolchain.base.errors import FoundryError, MissingError
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.base.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with all that went into it. ``idle`` names GPUs of this machine that the build cannot use; ``untold`` says
    why the GPUs that it can use are not known.
    """

    headers: tuple[GgufHeader, ...]
    devices: tuple[Device, ...]
    request: Request
    build: Build
    traits: Traits
    lessons: Lessons
    plan: MemoryPlan
    idle: str = ""
    untold: str = ""

    def again(self, lessons: Lessons) -> Planned:
        """With other lessons."""
        return _planned(replace(self, lessons=lessons), ask=None)

    def asking(self) -> Planned:
        """With the library's own sizes where it tells them for these devices, else as it is."""
        try:
            return _planned(self, ask=library_sizes(self.headers[0].path, len(self.plan.choice.needs)))
        except FoundryError as error:
            note = f"the library was not asked, sizes are computed: {error.message}"
            return replace(self, plan=replace(self.plan, notes=(*self.plan.notes, note)))

    def has_room_for(self, settings: Settings) -> bool:
        """Whether ``settings`` fit as the layers lie now."""
        n_gpus = len(self.plan.choice.needs) - 1
        demand, placement = as_demand(self.plan.demand, settings), as_placement(settings, n_gpus)
        computed = footprint(self.headers, demand, placement, n_gpus, traits=self.traits)
        used = max(shape_of(self.headers).n_expert_used, default=1)
        buffers = self.request.with_adapters(self.lessons.corrected(demand, placement, computed), demand, used)
        more = [max(0, each.compute - need.compute) for each, need in zip(buffers, self.plan.choice.needs, strict=True)]
        if len(self.plan.devices) == 1:
            return sum(more) <= self.plan.devices[0].left_bytes
        return all(size <= device.left_bytes for size, device in zip(more, self.plan.devices, strict=True))

    def learned(self, settings: Settings, lines: Sequence[str]) -> Lessons:
        """The lessons with what the library's log ``lines`` told of a load with ``settings``."""
        n_gpus = len(self.plan.choice.needs) - 1
        made = made_buffers(lines, n_gpus)
        if made is None:
            return self.lessons
        demand, placement = as_demand(self.plan.demand, settings), as_placement(settings, n_gpus)
        planned = footprint(self.headers, demand, placement, n_gpus, traits=self.traits)
        return self.lessons.with_load(demand, placement, planned, made)


def plan_here(
    headers: Sequence[GgufHeader],
    asked: Mapping[str, Setting],
    machine: Machine,
    *,
    mmproj_bytes: int = 0,
    adapter_bytes: int = 0,
    adapters: Sequence[GgufHeader] = (),
    sequences: int = 1,
    separate: bool = False,
    devices: tuple[Device, ...] | None = None,
    build: Build | None = None,
) -> Planned:
    """Plan the model of ``headers`` (all shards, the first first) for ``machine``, or for ``devices`` in its place with
    another ``build``. What was ``asked`` for is kept. Of ``adapters`` (their headers), which are part of
    ``adapter_bytes``, the compute buffers are planned as well.

    The library is loaded only where it alone knows its GPUs (``devices_at_hand``).
    """
    installed = build or installed_build()
    found, untold = (devices, "") if devices else devices_at_hand(machine, installed)
    settled = {name: setting.value for name, setting in asked.items()}
    traits = replace(CUDA, repacked=repacked_types(machine.cpu_flags))
    known = Lessons()
    if devices is None:
        known = lessons_for(headers, [(device.name, device.total_bytes) for device in found], build_id())
    request = Request(
        settled=settled,
        mmproj_bytes=mmproj_bytes,
        adapter_bytes=adapter_bytes,
        adapters=tuple(adapters),
        sequences=sequences,
        separate=separate,
    )
    idle = devices is None and installed.gpu_backend is None and "n_gpu_layers" not in asked
    planned = Planned(
        headers=tuple(headers),
        devices=found,
        request=request,
        build=installed,
        traits=traits,
        lessons=known,
        plan=plan_memory(headers, found, request, learned=known, build=installed, traits=traits),
        idle=", ".join(gpu.name for gpu in machine.gpus) if idle else "",
        untold=untold,
    )
    return replace(planned, plan=_with_gpus_told(planned))


def devices_at_hand(machine: Machine, build: Build) -> tuple[tuple[Device, ...], str]:
    """The devices of ``machine`` that ``build`` can use, and why its GPUs are not known; empty where they are.

    Where the machine does not tell them, the library does.
    """
    found = devices_here(machine, build, host_bandwidth=recorded_bandwidth(machine))
    if knows_gpus(machine, build) or found[0].kind == "unified":
        return found, ""
    from runtime.memory.library_devices import library_gpus

    try:
        told = library_gpus()
    except FoundryError as error:
        return found, error.message
    if nameless := [gpu.name for gpu in told if not gpu.total_bytes]:
        return found, f"the driver does not tell the memory of {', '.join(nameless)}"
    if machine.gpus and not told:
        return found, f"the library finds none of {', '.join(gpu.name for gpu in machine.gpus)}"
    return with_library_gpus(found, told, build), ""


def all_headers(header: GgufHeader) -> tuple[GgufHeader, ...]:
    """Of every shard of the model whose first header this is."""
    return tuple(read_header(path) for path in header.shard_paths) if header.split else (header,)


def library_sizes(path: Path, devices: int) -> Ask:
    """What answers for the model at ``path``; it raises MissingError where the library sees other devices."""

    def ask(demand: Demand, placement: Placement) -> tuple[BufferBytes, ...]:
        from runtime.memory import ask_library

        told = ask_library.ask(path, demand, placement)
        if len(told) != devices:
            raise MissingError(f"the library sees {len(told) - 1} GPUs, {devices - 1} were planned for")
        return told

    return ask


def as_demand(like: Demand, settings: Settings) -> Demand:
    """The demand that ``settings`` make, in all else ``like``."""
    return replace(
        like,
        n_ctx=settings.number("n_ctx") * (like.n_ctx // like.n_ctx_each),
        n_batch=settings.number("n_batch"),
        n_ubatch=settings.number("n_ubatch"),
        type_k=settings.text("type_k"),
        type_v=settings.text("type_v"),
    )


def as_placement(settings: Settings, n_gpus: int) -> Placement:
    """The placement that ``settings`` make."""
    if not n_gpus:
        return Placement(n_gpu_layers=0)
    return Placement(
        n_gpu_layers=settings.number("n_gpu_layers"),
        tensor_split=parse_split(settings.text("tensor_split")),
        cpu_expert_layers=settings.number("n_cpu_moe"),
    )


def _planned(planned: Planned, *, ask: Ask | None) -> Planned:
    plan = plan_memory(
        planned.headers,
        planned.devices,
        planned.request,
        ask=ask,
        learned=planned.lessons,
        build=planned.build,
        traits=planned.traits,
    )
    told = replace(planned, plan=plan)
    return replace(told, plan=_with_gpus_told(told))


def _with_gpus_told(planned: Planned) -> MemoryPlan:
    """The plan, saying which GPUs stay idle, and why."""
    plan = planned.plan
    if planned.idle:
        why = "this build has no GPU backend"
        warning = f"{why}, {planned.idle} stays idle: `./inv build --cuda`"
    elif planned.untold:
        why = f"GPUs are not planned for: {planned.untold}"
        warning = f"{why}; `--n-gpu-layers` asks for layers there"
    else:
        return plan
    settings = plan.settings
    if "n_gpu_layers" not in planned.request.settled:
        settings = (*settings, Setting(name="n_gpu_layers", value=0, origin="tuned", reason=why))
    return replace(plan, settings=settings, warnings=(*plan.warnings, warning))
