"""``plan``: where a model would lie, with which settings, and how fast it would be; nothing is loaded."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtime.commands.options import model_options, request_of
from runtime.prepare import settle_with, with_tuning
from toolchain.base.errors import ArtifactError, MemoryFitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from runtime.adapters import Chosen
    from runtime.memory.devices import Device
    from runtime.memory.here import Planned
    from runtime.memory.kernels import Build
    from runtime.settings import Settings
    from toolchain.base.gguf import GgufHeader
    from toolchain.base.machine import Machine

GOOD_TPS = 10.0
"""Tokens a second at which people read along: what ``--all-quants`` wants of its best."""


def add(verbs: Any) -> None:
    """Declare the verb."""
    plan = verbs.add_parser(
        "plan", parents=[model_options()], help="settings, memory and speed, without loading", description=run.__doc__
    )
    other = plan.add_argument_group("another machine", "sizes as 16GiB, or 16GiB@51 with a bandwidth in GB/s")
    other.add_argument("--vram", action="append", default=[], metavar="SIZE[,SIZE]", help="memory of its GPUs; 0: none")
    other.add_argument("--ram", metavar="SIZE", help="memory of its host")
    other.add_argument("--unified", metavar="SIZE", help="one memory for CPU and GPU, as in a Mac")
    plan.add_argument("--mmproj", metavar="FILE", help="a vision or audio part to load beside the model")
    plan.add_argument("--all-quants", action="store_true", help="a row for each quant of a hub repository")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    plan.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan a model for this machine or another: settings with reasons, memory, and the speed to expect.

    Of a hub repository only headers are read. Ends with 7 when it does not fit.
    """
    from runtime import adapters
    from runtime.memory.show import no_fit, plan_json, plan_lines
    from runtime.tune.record import measured_speed
    from toolchain.base import console, machine

    here = machine.probe()
    if arguments.all_quants:
        return _all_quants(arguments, here)
    headers, recipe, is_here = _headers(arguments)
    chosen = adapters.choose(arguments.lora, headers)
    if is_here:
        adapters.require_bases(chosen, headers[0], force=arguments.force)
    adapters.tell_effects(chosen)
    planned = _plan(arguments, headers, recipe, here, chosen)
    if not _described(arguments) and headers[0].path.exists():
        planned = planned.asking()
    settings = _settings(arguments, headers[0], recipe, here, planned)
    if not _described(arguments) and not arguments.no_tune:
        settings = with_tuning(settings, headers[0], here, planned)
    measured = None if _described(arguments) else measured_speed(headers[0], here, settings)
    speed = measured or planned.plan.speed
    if arguments.json:
        console.answer_json({"model": str(headers[0].path), **plan_json(planned.plan, settings, speed)})
    else:
        for line in plan_lines(planned.plan, settings, speed):
            console.answer(line)
    for warning in planned.plan.warnings:
        console.warn(warning)
    if not planned.plan.fits:
        raise no_fit(headers[0].path.name, planned.plan)
    return 0


def _all_quants(arguments: argparse.Namespace, here: Machine) -> int:
    """A row for each quant: where it would lie, with how much context, how fast; the best one is marked."""
    from runtime.hub_model import parse_hub_name, remote_model_headers
    from runtime.memory.show import rate
    from toolchain.base import console

    if parse_hub_name(arguments.model) is None:
        raise UsageError("--all-quants looks at a hub repository", hint=f"owner/repo instead of {arguments.model}")
    target = remote_model_headers(arguments.model, all_quants=True)
    rows = [_quant_row(arguments, name, paths, here) for name, paths in target.headers.items()]
    best = best_quant(rows)
    for row in rows:
        row["best"] = row["quant"] == best
    if arguments.json:
        console.answer_json({"model": target.listing.repo, "commit": target.listing.commit, "quants": rows})
    else:
        columns = ("quant", "size", "bits/weight", "where", "n_ctx", "t/s", "t/s prompt", "")
        console.answer_table(
            columns,
            [
                (
                    row["quant"],
                    console.format_bytes(row["bytes"]) if row["bytes"] else "-",
                    f"{row['bits_per_weight']:.2f}" if row["bytes"] else "-",
                    row["where"] or row["why"],
                    str(row["n_ctx"]) if row["fits"] else "-",
                    rate(row["generation_tps"]) if row["fits"] else "-",
                    rate(row["prompt_tps"]) if row["fits"] else "-",
                    "best" if row["best"] else "",
                )
                for row in rows
            ],
        )
    if best is None:
        raise MemoryFitError(f"no quant of {target.listing.repo} fits in memory", hint="take a smaller model")
    return 0


def _quant_row(arguments: argparse.Namespace, name: str, paths: tuple[Path, ...], here: Machine) -> dict[str, Any]:
    """One quant as JSON; of one that cannot be planned for, ``why`` says why."""
    from runtime.adapters import choose
    from runtime.memory.show import where
    from toolchain.base.gguf import read_header

    row: dict[str, Any] = {"quant": name, "bytes": 0, "bits_per_weight": 0.0, "fits": False, "where": "", "why": ""}
    row |= {"on_gpu": False, "n_ctx": 0, "generation_tps": 0.0, "prompt_tps": 0.0}
    try:
        headers = tuple(read_header(path) for path in paths)
        _require_usable(headers[0])
        size, params = sum(h.tensor_bytes for h in headers), sum(h.n_params for h in headers)
        row |= {"bytes": size, "bits_per_weight": round(8 * size / params, 2)}
        planned = _plan(arguments, headers, {}, here, choose(arguments.lora, headers))
    except (UsageError, ArtifactError) as error:
        return {**row, "why": error.message}
    plan = planned.plan
    return row | {
        "fits": plan.fits,
        "where": where(plan, planned.devices),
        "on_gpu": plan.choice.layout.is_whole or not plan.choice.layout.counts,
        "n_ctx": plan.demand.n_ctx,
        "generation_tps": plan.speed.generation_tps,
        "prompt_tps": plan.speed.prompt_tps,
    }


def best_quant(rows: list[dict[str, Any]]) -> str | None:
    """The most bits for each weight among those that lie in the fastest memory and are fast enough to read along with,
    else among all that are, else the fastest; None when nothing fits."""
    fitting = [row for row in rows if row["fits"]]
    quick = [row for row in fitting if row["generation_tps"] >= GOOD_TPS]
    chosen = [row for row in quick if row["on_gpu"]] or quick
    if chosen:
        return str(max(chosen, key=lambda row: row["bits_per_weight"])["quant"])
    return str(max(fitting, key=lambda row: row["generation_tps"])["quant"]) if fitting else None


def _headers(arguments: argparse.Namespace) -> tuple[tuple[GgufHeader, ...], Mapping[str, object], bool]:
    """The headers of what was typed, its recipe's block, and whether all of it is here: of a model on the hub nothing
    else is read.
    """
    from runtime.hub_model import HubName, remote_model_headers
    from runtime.memory.here import all_headers
    from runtime.model_file import open_model
    from runtime.resolve import locate
    from toolchain.base.gguf import read_header

    found = locate(arguments.model)
    if not isinstance(found, HubName):
        try:
            return all_headers(open_model(found.path)), found.runtime, True
        except UsageError as error:
            with suppress(UsageError):
                return all_headers(open_model(found.path, "embeddings")), found.runtime, True
            raise error
    target = remote_model_headers(arguments.model)
    headers = tuple(read_header(path) for path in target.headers[target.chosen.name])
    _require_usable(headers[0])
    return headers, {}, False


def _require_usable(header: GgufHeader) -> None:
    """Raise UsageError, that of a model that should write, unless ``header`` is of one that writes or makes vectors."""
    from runtime.model_file import require_embedding, require_generative

    try:
        require_generative(header)
    except UsageError as error:
        with suppress(UsageError):
            require_embedding(header)
            return
        raise error


def _plan(
    arguments: argparse.Namespace,
    headers: tuple[GgufHeader, ...],
    recipe: Mapping[str, object],
    here: Machine,
    chosen: tuple[Chosen, ...],
) -> Planned:
    from runtime.adapters import bytes_of
    from runtime.memory.footprint import mmproj_bytes
    from runtime.memory.here import plan_here
    from runtime.settings import asked
    from runtime.vision_file import vision_part

    request = request_of(arguments)
    settle_with(request, headers[0], here, recipe=recipe)  # a wrong value is told before anything is planned
    wishes = asked(recipe=recipe, env=os.environ, flags=request.flags)
    devices, build = _machine(arguments, here)
    vision = vision_part(arguments.mmproj or None, headers[0].path, look_beside=False)
    return plan_here(
        headers,
        wishes,
        here,
        mmproj_bytes=mmproj_bytes(vision) if vision else 0,
        adapter_bytes=bytes_of(chosen),
        adapters=[each.file.header for each in chosen],
        devices=devices,
        build=build,
    )


def _machine(arguments: argparse.Namespace, here: Machine) -> tuple[tuple[Device, ...] | None, Build | None]:
    """The devices and the build to plan for; None: those at hand. Described GPUs get the default CUDA build."""
    from runtime.memory.devices import devices_described
    from runtime.memory.here import devices_at_hand
    from runtime.memory.kernels import Build, installed_build

    if not _described(arguments):
        return None, None
    build = installed_build()
    at_hand, _ = devices_at_hand(here, build)
    devices = devices_described(ram=arguments.ram, vram=arguments.vram, unified=arguments.unified, here=at_hand)
    backends = {device.backend for device in devices}
    return devices, build if backends <= build.backends else Build(backends=frozenset({"CPU", *backends}))


def _settings(
    arguments: argparse.Namespace, header: GgufHeader, recipe: Mapping[str, object], here: Machine, planned: Planned
) -> Settings:
    """The settings of the plan; for a described machine none that speak of this one's GPUs, and threads that say whose
    they are."""
    from toolchain.base.gpu import Gpu

    if not _described(arguments):
        return settle_with(request_of(arguments), header, here, recipe=recipe, plan=planned.plan)
    gpus = tuple(Gpu(name=device.name, memory_bytes=device.total_bytes) for device in planned.plan.devices[1:])
    settings = settle_with(request_of(arguments), header, replace(here, gpus=gpus), recipe=recipe, plan=planned.plan)
    notes = {}
    if not gpus and not planned.plan.choice.layout.counts:
        notes["n_gpu_layers"] = "no GPU is described"
    if arguments.ram or arguments.unified:
        notes |= dict.fromkeys(("n_threads", "n_threads_batch"), "of this machine: it is known only there")
    entries = tuple(
        replace(entry, reason=notes[entry.name])
        if entry.name in notes and entry.origin in ("default", "tuned")
        else entry
        for entry in settings.entries
    )
    return replace(settings, entries=entries)


def _described(arguments: argparse.Namespace) -> bool:
    return bool(arguments.vram or arguments.ram or arguments.unified)
