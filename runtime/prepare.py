"""From what was typed to a loaded model: resolve, check the header, settle the settings, load."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from runtime.adapters import Chosen
    from runtime.engine import Engine
    from runtime.engine.model import Model
    from runtime.interrupts import Interrupt
    from runtime.memory.here import Planned
    from runtime.memory.plan import MemoryPlan
    from runtime.model_file import Purpose
    from runtime.resolve import Resolved
    from runtime.settings import Settings, Value
    from toolchain.base.gguf import GgufHeader
    from toolchain.base.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks for: a model as typed, settings by llama.cpp's names (None: not asked), LoRA adapters.

    ``lora`` holds ``FILE`` or ``FILE=SCALE``; ``force`` takes those of another base too. ``mmproj`` is the file of the
    vision part; where one is wanted (``sees``) and none is named, the one beside the model, or of its repository, is
    taken. ``tune`` is whether threads are measured, ``verbose`` whether the library's log is shown.
    """

    model: str
    flags: Mapping[str, Value | None] = field(default_factory=dict)
    lora: tuple[str, ...] = ()
    force: bool = False
    mmproj: str | None = None
    sees: bool = False
    tune: bool = True
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a typed model stands for, with the checked header of its (first) file."""

    resolved: Resolved
    header: GgufHeader


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is found, checked and planned for; nothing of it is loaded.

    ``recipe`` is the runtime block of the recipe that it came from, ``machine`` what ``settings`` were chosen for.
    """

    header: GgufHeader
    settings: Settings
    planned: Planned
    recipe: Mapping[str, object]
    machine: Machine
    adapters: tuple[Chosen, ...] = ()
    mmproj: Path | None = None


def tuning_is_off() -> bool:
    """Whether FOUNDRY_NO_TUNE says that nothing is to be measured."""
    return os.environ.get("FOUNDRY_NO_TUNE", "").strip().lower() not in ("", "0", "false", "no")


def find(model: str, purpose: Purpose = "text") -> Found:
    """The model that was typed, fetched or converted where it has to be; errors as of ``resolve``, ``open_model``."""
    from runtime.model_file import open_model
    from runtime.resolve import resolve

    resolved = resolve(model)
    return Found(resolved=resolved, header=open_model(resolved.path, purpose))


def prepare(
    request: Request,
    purpose: Purpose = "text",
    *,
    found: Found | None = None,
    sequences: int = 1,
    separate: bool = False,
) -> Prepared:
    """The model that was typed, with settings for it; the library is asked only where memory is tight.

    ``found`` is that model where it was looked up before. ``sequences`` replies are to be decoded together;
    ``separate`` ones have a context of ``n_ctx`` each. Raises MemoryFitError, with what would fit, when the model does
    not, and for adapters as ``check_adapter`` and ``require_base`` do.
    """
    from runtime import adapters
    from runtime.memory import footprint
    from runtime.memory.here import all_headers, plan_here
    from runtime.memory.show import no_fit
    from runtime.settings import asked
    from runtime.vision_file import vision_part
    from toolchain.base import console, machine

    found = found or find(request.model, purpose)
    resolved, header = found.resolved, found.header
    headers = all_headers(header)
    chosen = adapters.choose(request.lora, headers)
    vision = vision_part(request.mmproj, header.path, look_beside=request.sees, listing=resolved.listing)
    here = machine.probe()
    settle_with(request, header, here, recipe=resolved.runtime)  # a wrong value is told before anything is planned
    wishes = asked(recipe=resolved.runtime, env=os.environ, flags=request.flags)
    planned = plan_here(
        headers,
        wishes,
        here,
        adapter_bytes=adapters.bytes_of(chosen),
        adapters=[each.file.header for each in chosen],
        sequences=sequences,
        separate=separate,
        mmproj_bytes=footprint.mmproj_bytes(vision) if vision else 0,
    )
    if not planned.plan.fits and planned.lessons.shortfalls:
        planned = planned.again(planned.lessons.doubted())  # memory that was short once may be there today
    if planned.plan.tight:
        planned = planned.asking()
    if not planned.plan.fits:
        raise no_fit(header.path.name, planned.plan)
    adapters.require_bases(chosen, header, force=request.force)  # reads the whole model the first time: so late
    adapters.tell_effects(chosen)
    for warning in planned.plan.warnings:
        console.warn(warning)
    settings = settle_with(request, header, here, recipe=resolved.runtime, plan=planned.plan)
    if request.tune:
        settings = with_tuning(settings, header, here, planned)
    return Prepared(
        header=header,
        settings=settings,
        planned=planned,
        recipe=resolved.runtime,
        machine=here,
        adapters=chosen,
        mmproj=vision.path if vision else None,
    )


def settle_with(
    request: Request,
    header: GgufHeader,
    here: Machine,
    *,
    recipe: Mapping[str, object],
    plan: MemoryPlan | None = None,
) -> Settings:
    """Defaults, what ``plan`` and the machine's CPUs call for, and over them what was asked for."""
    from runtime.settings import settle
    from runtime.tune.threads import tuned_threads

    return settle(
        machine=here,
        n_ctx_train=header.n_ctx_train,
        tuned=(*tuned_threads(here), *(plan.settings if plan else ())),
        recipe=recipe,
        env=os.environ,
        flags=request.flags,
    )


def load_engine(
    prepared: Prepared,
    request: Request,
    interrupt: Interrupt,
    *,
    sequences: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Engine:
    """The model in memory with its adapters and tuned threads; ``engine.settings`` are those it has in the end.

    ``progress`` is told what share of the weights is in memory, 0 to 1.
    A load that runs out of memory, adapters included, is tried once more with what a new plan makes of it.
    """
    from runtime import adapters
    from runtime.engine import load
    from runtime.memory.back_off import Started, load_with_back_off

    header = prepared.header

    def attempt(settings: Settings, planned: Planned) -> Started[Engine]:
        engine = load(
            header.path,
            settings,
            verbose=request.verbose,
            interrupt=interrupt,
            sequences=sequences,
            progress=progress,
            refine=None
            if not request.tune
            else lambda model, chosen: _tuned(model, chosen, prepared, planned, interrupt),
        )
        lines = engine.model.log.lines()
        try:
            engine.model.log.begin()
            engine.set_adapters(adapters.load(engine.model, prepared.adapters))
            if prepared.mmproj:
                _open_vision(engine, prepared.mmproj, asked_for=request.mmproj is not None)
        except BaseException:
            engine.close()
            raise
        return Started(loaded=engine, settings=engine.settings, lines=lines)

    def settle(planned: Planned) -> Settings:
        fewer = settle_with(request, header, prepared.machine, recipe=prepared.recipe, plan=planned.plan)
        return fewer if not request.tune else with_tuning(fewer, header, prepared.machine, planned)

    return load_with_back_off(prepared.planned, prepared.settings, attempt, settle=settle)


def _open_vision(engine: Engine, path: Path, *, asked_for: bool) -> None:
    """One that only lay beside the model and does not belong to it is left alone."""
    from toolchain.base import console
    from toolchain.base.errors import ArtifactError, UsageError

    try:
        engine.open_vision(path)
    except (ArtifactError, UsageError) as error:
        if asked_for:
            raise
        console.warn(f"{path.name} lies beside the model and is not used: {error.message}")


def _tuned(model: Model, settings: Settings, prepared: Prepared, planned: Planned, interrupt: Interrupt) -> Settings:
    """The fastest threads for the model as loaded by ``planned``: as recorded, or measured now, the first time."""
    from runtime.tune.at_start import tuned
    from toolchain.base import console

    told: list[str] = []

    def tell(name: str) -> None:
        if not told:
            console.say("measuring the fastest threads for this model, once (seconds; --no-tune skips it)")
        told.append(name)

    found = tuned(model, settings, prepared.header, prepared.machine, interrupt=interrupt, on_setting=tell)
    return _where_it_fits(found, settings, planned)


def with_tuning(settings: Settings, header: GgufHeader, here: Machine, planned: Planned) -> Settings:
    """``settings`` with what ``tune`` measured here."""
    from runtime.tune.record import recorded
    from runtime.tune.threads import apply

    tuning = recorded(header, here, settings)
    if tuning is None:
        return settings
    return _where_it_fits(apply(settings, tuning, here), settings, planned)


def _where_it_fits(tuned: Settings, settings: Settings, planned: Planned) -> Settings:
    """``tuned``, with the micro-batch of ``settings`` where the tuned one would move a layer."""
    if tuned["n_ubatch"].value == settings["n_ubatch"].value or planned.has_room_for(tuned):
        return tuned
    kept = settings["n_ubatch"]
    return replace(tuned, entries=tuple(kept if entry.name == "n_ubatch" else entry for entry in tuned.entries))
