"""``plan``: where a model would lie, with which settings, and how fast it would be; nothing is loaded."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from runtime.commands.options import model_options
from runtime.commands.prepare import settle_with, with_tuning
from toolchain.base.errors import MemoryFitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runtime.memory.devices import Device
    from runtime.memory.here import Planned
    from runtime.memory.kernels import Build
    from runtime.memory.speed import Speed
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
    from runtime.memory.show import no_fit, plan_json, plan_lines
    from toolchain.base import console, machine

    here = machine.probe()
    if arguments.all_quants:
        return _all_quants(arguments, here)
    headers, recipe = _headers(arguments)
    planned = _plan(arguments, headers, recipe, here)
    if not _described(arguments) and headers[0].path.exists():
        planned = planned.asking()
    settings = settle_with(arguments, headers[0], here, recipe=recipe, plan=planned.plan)
    if not _described(arguments) and not arguments.no_tune:
        settings = with_tuning(settings, headers[0], here, planned)
    measured = None if _described(arguments) else _measured(headers[0], here, settings)
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
    from runtime.memory.show import rate, where
    from runtime.model_file import require_generative
    from toolchain.base import console
    from toolchain.base.gguf import read_header

    if parse_hub_name(arguments.model) is None:
        raise UsageError("--all-quants looks at a hub repository", hint=f"owner/repo instead of {arguments.model}")
    target = remote_model_headers(arguments.model, all_quants=True)
    rows: list[dict[str, Any]] = []
    for name, paths in target.headers.items():
        headers = tuple(read_header(path) for path in paths)
        require_generative(headers[0])
        planned = _plan(arguments, headers, {}, here)
        size, params = sum(h.tensor_bytes for h in headers), sum(h.n_params for h in headers)
        rows.append(
            {
                "quant": name,
                "bytes": size,
                "bits_per_weight": round(8 * size / params, 2),
                "fits": planned.plan.fits,
                "where": where(planned.plan, planned.devices),
                "on_gpu": planned.plan.choice.layout.is_whole or not planned.plan.choice.layout.counts,
                "n_ctx": planned.plan.demand.n_ctx,
                "generation_tps": planned.plan.speed.generation_tps,
                "prompt_tps": planned.plan.speed.prompt_tps,
            }
        )
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
                    console.format_bytes(row["bytes"]),
                    f"{row['bits_per_weight']:.2f}",
                    row["where"],
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


def best_quant(rows: list[dict[str, Any]]) -> str | None:
    """The most bits for each weight among those that lie in the fastest memory and are fast enough to read along with,
    else among all that are, else the fastest; None when nothing fits."""
    fitting = [row for row in rows if row["fits"]]
    quick = [row for row in fitting if row["generation_tps"] >= GOOD_TPS]
    chosen = [row for row in quick if row["on_gpu"]] or quick
    if chosen:
        return str(max(chosen, key=lambda row: row["bits_per_weight"])["quant"])
    return str(max(fitting, key=lambda row: row["generation_tps"])["quant"]) if fitting else None


def _headers(arguments: argparse.Namespace) -> tuple[tuple[GgufHeader, ...], Mapping[str, object]]:
    """The headers of what was typed and its recipe's block; of a model on the hub nothing else is read."""
    from runtime.hub_model import HubName, remote_model_headers
    from runtime.memory.here import all_headers
    from runtime.model_file import open_model, require_generative
    from runtime.resolve import locate
    from toolchain.base.gguf import read_header

    found = locate(arguments.model)
    if not isinstance(found, HubName):
        return all_headers(open_model(found.path)), found.runtime
    target = remote_model_headers(arguments.model)
    headers = tuple(read_header(path) for path in target.headers[target.chosen.name])
    require_generative(headers[0])
    return headers, {}


def _plan(
    arguments: argparse.Namespace, headers: tuple[GgufHeader, ...], recipe: Mapping[str, object], here: Machine
) -> Planned:
    from runtime.commands.prepare import adapters_bytes, flags_of
    from runtime.memory.footprint import mmproj_bytes
    from runtime.memory.here import plan_here
    from runtime.settings import asked
    from toolchain.base.gguf import read_header

    settle_with(arguments, headers[0], here, recipe=recipe)  # a wrong value is told before anything is planned
    wishes = asked(recipe=recipe, env=os.environ, flags=flags_of(arguments))
    devices, build = _machine(arguments, here)
    projector = 0
    if arguments.mmproj:
        beside = read_header(_path(arguments.mmproj))
        if beside.kind != "mmproj":
            raise UsageError(f"--mmproj: {beside.path.name} is no vision or audio part", hint="its name says mmproj")
        projector = mmproj_bytes(beside)
    return plan_here(
        headers,
        wishes,
        here,
        mmproj_bytes=projector,
        adapter_bytes=adapters_bytes(arguments),
        devices=devices,
        build=build,
    )


def _machine(arguments: argparse.Namespace, here: Machine) -> tuple[tuple[Device, ...] | None, Build | None]:
    """The devices and the build to plan for; None: those at hand. Described GPUs get the default CUDA build."""
    from runtime.memory.devices import devices_described, devices_here
    from runtime.memory.kernels import Build, installed_build
    from runtime.tune.bandwidth import recorded_bandwidth

    if not _described(arguments):
        return None, None
    build = installed_build()
    at_hand = devices_here(here, build, host_bandwidth=recorded_bandwidth(here))
    devices = devices_described(ram=arguments.ram, vram=arguments.vram, unified=arguments.unified, here=at_hand)
    backends = {device.backend for device in devices}
    return devices, build if backends <= build.backends else Build(backends=frozenset({"CPU", *backends}))


def _described(arguments: argparse.Namespace) -> bool:
    return bool(arguments.vram or arguments.ram or arguments.unified)


def _measured(header: GgufHeader, here: Machine, settings: Settings) -> Speed | None:
    """What ``tune`` measured of this model here, where it did."""
    from runtime.memory.speed import Speed
    from runtime.tune.record import recorded

    tuning = recorded(header, here, settings)
    if tuning is None or not {"n_threads", "n_threads_batch"} <= set(tuning.found):
        return None
    generation, prompt = tuning.found["n_threads"], tuning.found["n_threads_batch"]
    return Speed(
        generation_tps=generation.rate(generation.value), prompt_tps=prompt.rate(prompt.value), basis="measured by tune"
    )


def _path(typed: str) -> Any:
    from toolchain.base import files

    return files.expand(typed)
