"""GgufHeader + devices + wishes -> MemoryPlan: the settings of the best predicted speed that fit, each with its reason.

Asked context is kept. Nothing is planned that pages weights from disk: a host smaller than what lies on it is a "no",
with what would fit instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from runtime.memory import words
from runtime.memory.devices import Device, DeviceKind
from runtime.memory.footprint import CUDA, BufferBytes, Demand, Placement, Traits, adapter_compute
from runtime.memory.kernels import Build, installed_build, is_fast
from runtime.memory.learned import Lessons
from runtime.memory.search import Choice, Search, as_fixed, default_context, pooled
from runtime.memory.shape import ModelShape, shape_of
from runtime.memory.sizes import Ask, Need, Sizes
from runtime.memory.speed import Speed, Work
from runtime.memory.weights import EXPERTS
from runtime.settings import Setting, Value
from toolchain.base.gguf import GgufHeader

_MOST_ASKED: Final = 4  # an answer takes the library some tenths of a second


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is settled already, by setting; the rest is for the plan to choose.

    ``mmproj_bytes`` and ``adapter_bytes`` ride along; ``adapters``, headers of what the latter are, add to compute
    buffers. ``sequences`` replies are decoded together; ``separate`` ones have a context of ``n_ctx`` each.
    """

    settled: Mapping[str, Value] = field(default_factory=dict)
    mmproj_bytes: int = 0
    adapter_bytes: int = 0
    adapters: tuple[GgufHeader, ...] = ()
    sequences: int = 1
    separate: bool = False

    def with_adapters(self, buffers: tuple[BufferBytes, ...], demand: Demand, used: int = 1) -> tuple[BufferBytes, ...]:
        """``buffers`` with what adapters add to each device's compute; ``used`` experts work on a token."""
        more = sum(adapter_compute(each, demand.n_ubatch, n_expert_used=used) for each in self.adapters)
        return tuple(replace(each, compute=each.compute + more) for each in buffers)


@dataclass(kw_only=True)
class _Sizes(Sizes):
    """With what adapters add to compute buffers, whoever told the rest: the library is asked without them."""

    request: Request
    used: int

    def buffers(self, demand: Demand, placement: Placement) -> tuple[BufferBytes, ...]:
        return self.request.with_adapters(super().buffers(demand, placement), demand, self.used)


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Bytes on one device. ``experts`` are part of ``weights_bytes``, ``output`` (logits) of ``compute_bytes``.

    ``left_bytes`` is what of ``free_bytes`` nobody takes and no margin keeps; below zero, so much is missing.
    """

    name: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int
    weights_bytes: int
    experts_bytes: int
    kv_bytes: int
    compute_bytes: int
    output_bytes: int
    mmproj_bytes: int
    adapters_bytes: int
    margin_bytes: int
    left_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.mmproj_bytes + self.adapters_bytes

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What was decided, why, and what it takes.

    ``settings`` are those that the plan chose against the defaults. ``notes`` tell why, ``warnings`` what the user
    should know even when nobody asks for the plan. ``instead`` says what would fit when this does not. ``exact``: the
    sizes are the library's own.
    """

    settings: tuple[Setting, ...]
    devices: tuple[DevicePlan, ...]
    fits: bool
    speed: Speed
    cpu_expert_layers: int
    tensor_split: tuple[int, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    instead: str
    exact: bool
    demand: Demand
    placement: Placement
    choice: Choice

    @property
    def tight(self) -> bool:
        """Whether a device would have less than a twentieth left: then the library is worth asking."""
        return any(device.left_bytes < device.total_bytes // 20 for device in self.devices if device.used_bytes)


def plan_memory(
    headers: Sequence[GgufHeader],
    devices: tuple[Device, ...],
    request: Request,
    *,
    ask: Ask | None = None,
    learned: Lessons | None = None,
    build: Build | None = None,
    traits: Traits = CUDA,
) -> MemoryPlan:
    """Plan a model (its header, or those of all shards, the first first) on ``devices`` (host first).

    ``ask`` is the library's own answer: the arithmetic searches, the library has the last word, ``_MOST_ASKED`` times
    at most. ``build`` is the installed one unless given.
    """
    lessons = learned or Lessons()
    spared = tuple(_spared(device, lessons) for device in devices)
    shape = shape_of(headers)
    n_gpus = 1 if spared[0].kind == "unified" else len(spared) - 1
    sizes = _Sizes(
        request=request,
        used=max(shape.n_expert_used, default=1),
        headers=headers,
        n_gpus=n_gpus,
        mmproj_bytes=request.mmproj_bytes,
        adapter_bytes=request.adapter_bytes,
        traits=traits,
        lessons=lessons,
    )
    search = Search(
        shape=shape,
        sizes=sizes,
        devices=spared,
        build=build or installed_build(),
        work=work_of(headers, shape),
        fixed=as_fixed(request.settled, request.sequences, separate=request.separate),
    )
    choice, wary = search.best(), search
    if ask is not None:
        wary, choice = _asked(search, choice, ask)
    return _plan(search, choice, request, wary=wary, exact=ask is not None)


def work_of(headers: Sequence[GgufHeader], shape: ModelShape) -> Work:
    """What a token takes: of experts those in use, and all weights but the embedding."""
    used = max(shape.n_expert_used, default=0) / shape.n_expert if shape.n_expert else 1.0
    params = 0.0
    for header in headers:
        for tensor in header.tensors:
            if tensor.name != "token_embd.weight" or shape.is_tied:
                params += tensor.n_elements * (used if EXPERTS.search(tensor.name) else 1.0)
    return Work(used=used, params=params)


def _spared(device: Device, lessons: Lessons) -> Device:
    most = lessons.most_bytes(device.name)
    return device if most is None else replace(device, margin_bytes=max(device.margin_bytes, device.free_bytes - most))


def _asked(search: Search, choice: Choice, ask: Ask) -> tuple[Search, Choice]:
    """The choice with the library's sizes; where it does not fit after all, the arithmetic searches again with as much
    kept free as it was wrong by. The search that knows of it comes with the choice."""
    asking, wary = replace(search, sizes=replace(search.sizes, ask=ask, _known={})), search
    told = asking.choice(choice.demand, choice.layout)
    short = [0] * len(told.needs)
    for _ in range(_MOST_ASKED - 1):
        if told.fits or not choice.fits:
            break
        computed = search.sizes.needs(told.demand, told.layout)
        wrong = [one.total - other.total for one, other in zip(told.needs, computed, strict=True)]
        short = [max(one, other) for one, other in zip(short, wrong, strict=True)]
        wary = replace(search, devices=_warier(search.devices, short))
        choice = wary.best()
        if choice.fits:
            told = asking.choice(choice.demand, choice.layout)
    parts = search.sizes.needs(told.demand, told.layout)
    named = tuple(  # the library does not tell experts and logits apart
        replace(need, experts=part.experts, output=part.output) for need, part in zip(told.needs, parts, strict=True)
    )
    return wary, replace(told, needs=named)


def _warier(devices: tuple[Device, ...], short: Sequence[int]) -> tuple[Device, ...]:
    """With margins larger by ``short`` bytes (host first)."""
    each = [sum(short)] if devices[0].kind == "unified" else short
    pairs = zip(devices, each, strict=True)
    return tuple(replace(device, margin_bytes=device.margin_bytes + more) for device, more in pairs)


def _plan(search: Search, choice: Choice, request: Request, *, wary: Search, exact: bool) -> MemoryPlan:
    devices = _device_plans(search, choice.needs)
    placement = choice.layout.placement
    notes = [*words.notes(search, choice), *search.sizes.lessons.limits(device.name for device in search.devices)]
    if not exact:
        notes += words.estimates(search, choice)
    return MemoryPlan(
        settings=_settings(search, choice, devices, request),
        devices=devices,
        fits=choice.fits,
        speed=choice.speed,
        cpu_expert_layers=choice.layout.host_experts,
        tensor_split=choice.layout.counts if len(choice.layout.counts) > 1 else (),
        notes=tuple(notes),
        warnings=_warnings(search, choice),
        instead="" if choice.fits else words.instead(wary, choice),
        exact=exact,
        demand=choice.demand,
        placement=placement,
        choice=choice,
    )


def _device_plans(search: Search, needs: tuple[Need, ...]) -> tuple[DevicePlan, ...]:
    first = search.devices[0]
    if first.kind == "unified":
        together = Need(**{name: sum(getattr(need, name) for need in needs) for name in vars(needs[0])})
        twice = together.total - pooled(needs, first, search.sizes)
        return (_device_plan(first, replace(together, weights=together.weights - twice)),)
    return tuple(_device_plan(device, need) for device, need in zip(search.devices, needs, strict=True))


def _device_plan(device: Device, need: Need) -> DevicePlan:
    return DevicePlan(
        name=device.name,
        kind=device.kind,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        weights_bytes=need.weights,
        experts_bytes=need.experts,
        kv_bytes=need.kv,
        compute_bytes=need.compute + need.results,
        output_bytes=need.output,
        mmproj_bytes=need.mmproj,
        adapters_bytes=need.adapters,
        margin_bytes=device.margin_bytes,
        left_bytes=device.free_bytes - device.margin_bytes - need.total,
    )


def _settings(search: Search, choice: Choice, devices: tuple[DevicePlan, ...], request: Request) -> tuple[Setting, ...]:
    """What the plan chose where nothing was settled, and where it is not the default."""
    demand, layout = choice.demand, choice.layout
    wanted: dict[str, tuple[Value, str]] = {}
    if search.gpus:
        wanted["n_gpu_layers"] = (layout.n_gpu_layers, words.layers_reason(search, choice, devices))
        if any(row.experts for row in search.sizes.table(demand).layers):
            wanted["n_cpu_moe"] = (layout.host_experts, words.experts_reason(layout))
    if len(layout.counts) > 1:
        split = ",".join(map(str, layout.counts))
        wanted["tensor_split"] = (split, "layers on " + ", ".join(device.name for device in search.gpus))
    if demand.n_ctx_each != default_context(search.shape):
        wanted["n_ctx"] = (demand.n_ctx_each, f"lowered from {default_context(search.shape)}: no more fits")
    if demand.n_ubatch != search.demand(demand.n_ctx_each).n_ubatch:
        wanted["n_ubatch"] = (demand.n_ubatch, words.ubatch_reason(demand))
    if demand.type_k == "q8_0" and (search.fixed.type_k, search.fixed.type_v) == (None, None):
        reason = words.cache_reason(search, choice)
        wanted |= {"type_k": (demand.type_k, reason), "type_v": (demand.type_v, reason)}
    return tuple(
        Setting(name=name, value=value, origin="tuned", reason=reason)
        for name, (value, reason) in wanted.items()
        if name not in request.settled
    )


def _warnings(search: Search, choice: Choice) -> tuple[str, ...]:
    """A cache type that was asked for and has no fast kernel where its layers lie."""
    demand, layout = choice.demand, choice.layout
    if (search.fixed.type_k, search.fixed.type_v) == (None, None):
        return ()
    backends = {device.backend for device in search.gpus} if layout.n_gpu_layers else set()
    if layout.n_gpu_layers < layout.n_all - 1:
        backends.add("CPU")
    slow = [
        each for each in sorted(backends) if not is_fast(each, search.build, search.shape, demand.type_k, demand.type_v)
    ]
    return tuple(
        f"this build has no fast attention kernel for a {demand.type_k}/{demand.type_v} cache on {each}: "
        "it will be slower than f16"
        for each in slow
    )
