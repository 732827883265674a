"""``tune``: measure threads and micro-batch for a model on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from runtime.commands.options import model_options, request_of
from runtime.prepare import prepare

if TYPE_CHECKING:
    from runtime.settings import Settings
    from runtime.tune.record import Tuning
    from toolchain.base.gguf import GgufHeader
    from toolchain.base.machine import Machine

WHAT = {"n_threads": "generation", "n_threads_batch": "prompts", "n_ubatch": "micro-batches"}


def add(verbs: Any) -> None:
    """Declare the verb."""
    tuner = verbs.add_parser(
        "tune", parents=[model_options()], help="measure the fastest threads for a model", description=run.__doc__
    )
    tuner.add_argument("--again", action="store_true", help="measure even if this model was measured here before")
    tuner.add_argument("--json", action="store_true", help="one JSON object on stdout: settings and every figure")
    tuner.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure threads for generation and for prompts, and the micro-batch, once for this machine, model and build."""
    arguments.no_tune = True  # what was measured before is looked at below
    prepared = prepare(request_of(arguments))
    header, settings, here = prepared.header, prepared.settings, prepared.machine
    from runtime.tune.bandwidth import read_bandwidth
    from runtime.tune.record import record_path, recorded
    from runtime.tune.threads import apply
    from toolchain.base import console

    settings = apply(settings, None, here)
    known = None if arguments.again else recorded(header, here, settings)
    tuning = known or _measured(arguments, header, settings, here)
    threads = here.prompt_threads.count
    bandwidth = read_bandwidth(here, threads=threads, again=arguments.again)
    path = record_path(header, here, settings)
    settings = apply(settings, tuning, here)
    if arguments.json:
        answer = {
            "model": str(header.path),
            "settings": [entry for entry in settings.as_json() if entry["name"] in WHAT],
            "measured_now": known is None and bool(tuning.asked),
            "record": str(path) if path.exists() else None,
            "tuning": tuning.as_json(),
            "read_bandwidth": {"threads": threads, "bytes_per_s": round(bandwidth)},
        }
        console.answer_json(answer)
        return 0
    _show(tuning, settings)
    console.answer(f"memory is read at {bandwidth / 1e9:.1f} GB/s with {threads} thread{'s' if threads > 1 else ''}")
    if known is not None:
        console.say("measured before; --again measures anew")
    elif not tuning.settled:
        console.say("the machine was not quiet: the next start measures again")
    return 0


def _measured(arguments: argparse.Namespace, header: GgufHeader, settings: Settings, here: Machine) -> Tuning:
    from runtime.engine.load import load_model
    from runtime.interrupts import interrupts_noted
    from runtime.tune.measure import measure
    from runtime.tune.record import keep, wanted
    from toolchain.base import console

    if not wanted(settings):
        console.say("every setting that could be tuned was given: nothing to measure")
    with interrupts_noted() as interrupt:
        model = load_model(header.path, settings, verbose=arguments.verbose, interrupt=interrupt)
        try:
            with console.step("measure") as step:
                tuning = measure(model, settings, here, interrupt=interrupt)
                step.note = ", ".join(WHAT[name] for name in tuning.found) or "nothing: the model is too slow for it"
        finally:
            model.close()
    return keep(tuning, header, here, settings) if tuning.asked else tuning


def _show(tuning: Tuning, settings: Settings) -> None:
    """A table of threads, one of micro-batches where they were measured, and the settings with their reasons."""
    from runtime.tune.threads import shown_rate
    from toolchain.base import console

    rates = {name: {point.value: point.rate for point in each.points} for name, each in tuning.found.items()}
    generation, prompt, micro = (rates.get(name, {}) for name in ("n_threads", "n_threads_batch", "n_ubatch"))

    def cell(of: dict[int, float], value: int) -> str:
        return shown_rate(of[value]) if value in of else ""

    def chosen(value: int, *names: str) -> str:
        return ", ".join(WHAT[name] for name in names if name in rates and settings[name].value == value)

    rows = [
        (str(value), cell(generation, value), cell(prompt, value), chosen(value, "n_threads", "n_threads_batch"))
        for value in sorted({*generation, *prompt})
    ]
    if rows:
        console.answer_table(("threads", "generation t/s", "prompt t/s", "chosen for"), rows)
    if micro:
        sizes = [(str(value), cell(micro, value), chosen(value, "n_ubatch")) for value in sorted(micro)]
        console.answer_table(("n_ubatch", "prompt t/s", "chosen for"), sizes)
    for name in WHAT:
        entry = settings[name]
        console.answer(f"{name:<16} {entry.value:<6} {entry.origin:<8} {entry.reason}")
