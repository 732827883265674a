"""What was typed -> models as they are to be served: found, checked, and planned for all clients together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.serve.command import DEFAULT_PARALLEL, MOST_PARALLEL, Served
from toolchain.base.errors import MemoryFitError, UsageError

if TYPE_CHECKING:
    from runtime.memory.here import Planned
    from runtime.memory.plan import MemoryPlan
    from runtime.model_file import Purpose
    from runtime.prepare import Found, Prepared, Request
    from runtime.resolve import Resolved


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model to serve, and the plan that its settings come from."""

    model: Served
    plan: MemoryPlan


def plan_model(request: Request, *, parallel: int | None, pooling: str | None = None) -> ModelPlan:
    """The model that ``request`` names, for ``parallel`` clients (None: 4, 2 or 1; nothing gives way for them).

    Raises as ``prepare`` does; UsageError for a model that makes neither text nor vectors.
    """
    from runtime.prepare import prepare

    if parallel is not None and not 1 <= parallel <= MOST_PARALLEL:
        raise UsageError(f"--parallel {parallel}: it must lie between 1 and {MOST_PARALLEL}")
    found, purpose = _found(request.model)
    if pooling and purpose != "embeddings":
        writes = f"{found.header.path.name} writes text"
        raise UsageError(f"--pooling {pooling}: {writes}", hint="serve it without --pooling")
    if purpose == "embeddings":
        request = _whole_batches(request, found)
    prepared = prepare(request, purpose, found=found, sequences=parallel or 1, separate=True)
    clients = parallel or 1
    if parallel is None:
        prepared, clients = _with_more_clients(prepared, request)
    plan = prepared.planned.plan
    name = name_of(request.model, found.resolved)
    model = Served(
        name=name,
        aliases=(request.model,) if request.model != name else (),
        path=prepared.header.path.absolute(),
        purpose=purpose,
        settings=prepared.settings,
        parallel=clients,
        lora=tuple((each.path.absolute(), each.scale) for each in prepared.adapters),
        mmproj=prepared.mmproj.absolute() if prepared.mmproj else None,
        pooling=pooling,
        free_bytes=max(0, plan.devices[0].left_bytes),
    )
    _tell_untuned(prepared, request)
    return ModelPlan(model=model, plan=plan)


def most_clients(one: Planned) -> tuple[Planned, int]:
    """The plan for 4 or 2 clients, if all that ``one``, a plan for one client, chose stays as it is; else that plan."""
    for clients in (DEFAULT_PARALLEL, DEFAULT_PARALLEL // 2):
        wider = replace(one, request=replace(one.request, sequences=clients, separate=True)).again(one.lessons)
        if wider.plan.tight:
            wider = wider.asking()
        if _as_good(wider, one):
            return wider, clients
    return one, 1


def name_of(typed: str, resolved: Resolved) -> str:
    """What clients call the model: a recipe's name, a repository's, else the file's name without its ending."""
    if resolved.recipe is not None:
        chosen = typed.rpartition(":")[2].lower() == str(resolved.type).lower()
        return f"{resolved.recipe}:{resolved.type}" if chosen else resolved.recipe
    return typed if resolved.repo is not None else resolved.path.stem


def fits_together(plans: Sequence[MemoryPlan]) -> int:
    """The most of these models that fit in memory at once, whichever they are; at least 1."""
    for count in range(len(plans), 1, -1):
        if all(missing <= 0 for missing in _missing(plans, count)):
            return count
    return 1


def require_together(plans: Sequence[MemoryPlan], count: int) -> None:
    """Raise MemoryFitError unless any ``count`` of these models fit in memory at once."""
    from toolchain.base.console import format_bytes

    names = [device.name for device in plans[0].devices]
    short = {name: missing for name, missing in zip(names, _missing(plans, count), strict=True) if missing > 0}
    if short and count > 1:
        most = fits_together(plans)
        raise MemoryFitError(
            f"{count} of these models do not fit in memory together",
            evidence="\n".join(f"{name}: {format_bytes(missing)} missing" for name, missing in short.items()),
            hint=f"--models-max {most}: the least recently used one is then unloaded for the next",
        )


def sharing(models: Sequence[Served], plans: Sequence[MemoryPlan], count: int) -> tuple[Served, ...]:
    """The models, what any ``count`` of them leave of the host's memory being shared among those."""
    left = max(0, -_missing(plans, count)[0]) // count
    return tuple(replace(model, free_bytes=left) for model in models)


def _missing(plans: Sequence[MemoryPlan], count: int) -> list[int]:
    """Bytes that are missing on each device for the ``count`` models that take most of it."""
    found = []
    for devices in zip(*(plan.devices for plan in plans), strict=True):
        used = sorted((device.used_bytes for device in devices), reverse=True)[:count]
        found.append(sum(used) + devices[0].margin_bytes - min(device.free_bytes for device in devices))
    return found


def _found(typed: str) -> tuple[Found, Purpose]:
    """For text where the model writes any, else for vectors; UsageError, saying what it is, when it makes neither."""
    from runtime.model_file import open_model
    from runtime.prepare import Found
    from runtime.resolve import resolve

    resolved = resolve(typed)
    try:
        return Found(resolved=resolved, header=open_model(resolved.path)), "text"
    except UsageError as error:
        try:
            return Found(resolved=resolved, header=open_model(resolved.path, "embeddings")), "embeddings"
        except UsageError:
            raise error from None


def _with_more_clients(prepared: Prepared, request: Request) -> tuple[Prepared, int]:
    from runtime.prepare import settle_with, with_tuning

    wider, clients = most_clients(prepared.planned)
    if clients == 1:
        return prepared, 1
    settings = settle_with(request, prepared.header, prepared.machine, recipe=prepared.recipe, plan=wider.plan)
    if request.tune:
        settings = with_tuning(settings, prepared.header, prepared.machine, wider)
    return replace(prepared, planned=wider, settings=settings), clients


def _as_good(wider: Planned, one: Planned) -> bool:
    """Whether ``wider`` fits, and neither context, cache type nor a layer of ``one`` gives way."""
    demands, layouts = (wider.plan.demand, one.plan.demand), (wider.plan.choice.layout, one.plan.choice.layout)
    kept = {(demand.n_ctx_each, demand.type_k, demand.type_v) for demand in demands}
    placed = {(layout.n_gpu_layers, layout.host_experts) for layout in layouts}
    return wider.plan.fits and len(kept) == len(placed) == 1


def _whole_batches(request: Request, found: Found) -> Request:
    """An encoder sees a text at once: batches as long as the context, unless they were asked for."""
    import os

    from runtime.settings import DEFAULT_N_CTX, asked

    wishes = asked(recipe=found.resolved.runtime, env=os.environ, flags=request.flags)
    trained = found.header.n_ctx_train or DEFAULT_N_CTX
    n_ctx = int(wishes["n_ctx"].value) if "n_ctx" in wishes else min(trained, DEFAULT_N_CTX)
    batches = {name: n_ctx for name in ("n_batch", "n_ubatch") if name not in wishes}
    return replace(request, flags={**request.flags, **batches})


def _tell_untuned(prepared: Prepared, request: Request) -> None:
    from runtime.tune.record import recorded
    from toolchain.base import console

    if request.tune and recorded(prepared.header, prepared.machine, prepared.settings) is None:
        console.say(f"threads are computed, not measured: `python -m runtime tune {request.model}` measures them once")
