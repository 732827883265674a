"""Threads and micro-batches measured on the loaded model, in a small context of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from runtime.engine.load import make_context
from runtime.engine.model import Model
from runtime.interrupts import Interrupt
from runtime.settings import Settings
from runtime.tune.bursts import Bench
from runtime.tune.neighbours import Neighbours, crowded
from runtime.tune.record import TunedName, Tuning, wanted
from runtime.tune.search import UBATCH_SAME, Found, search
from runtime.tune.threads import thread_candidates
from toolchain.base.machine import Machine

BUDGET_S: Final = 5.0
_ORDER: Final[tuple[TunedName, ...]] = ("n_threads_batch", "n_threads", "n_ubatch")
_SHARE: Final = 0.4  # of the budget for each number of threads; micro-batches get what is left
_N_CTX: Final = 1024
_MICRO_BATCHES: Final = (128, 256, 512, 1024)

OnSetting = Callable[[TunedName], None]


def measure(
    model: Model,
    settings: Settings,
    machine: Machine,
    *,
    budget_s: float = BUDGET_S,
    interrupt: Interrupt | None = None,
    on_setting: OnSetting | None = None,
) -> Tuning:
    """Measure what ``settings`` leave open on the loaded ``model``, in about ``budget_s`` seconds.

    A model too slow for that gets fewer bursts and fewer settings, but an answer. A context of at most 1024 tokens
    with the same cache types and micro-batch is made for it and freed again. Raises MemoryFitError when that
    context does not fit, KeyboardInterrupt once ``interrupt`` is raised.
    """
    asked = wanted(settings)
    began = time.perf_counter()
    busy = Neighbours()
    context = make_context(model, _small(model, settings, machine))
    try:
        bench = Bench(context, machine.quota, interrupt or Interrupt())
        bench.warm_up(settings.number("n_threads"), settings.number("n_threads_batch"), budget_s)
        found: dict[TunedName, Found] = {}
        for name in _ORDER:
            left = budget_s - (time.perf_counter() - began)
            budget = left if name == "n_ubatch" else _SHARE * budget_s
            if name in asked and bench.can(name, budget):
                if on_setting:
                    on_setting(name)
                found[name] = _settle(name, bench, settings, machine, budget)
    finally:
        context.close()
    most = max((p.value for name, each in found.items() if name != "n_ubatch" for p in each.points), default=1)
    others = busy.cpus()
    return Tuning(
        asked=asked,
        found=found,
        others=others,
        crowded=crowded(machine, most, others),
        depth=bench.depth,
        batch=bench.batch,
        seconds=time.perf_counter() - began,
    )


def _settle(name: TunedName, bench: Bench, settings: Settings, machine: Machine, budget_s: float) -> Found:
    match name:
        case "n_threads":
            start = machine.generation_threads.count
            return search(thread_candidates(machine, start), start, bench.generation, budget_s=budget_s)
        case "n_threads_batch":
            start = machine.prompt_threads.count
            found = search(thread_candidates(machine, start), start, bench.prompt, budget_s=budget_s)
            bench.set_threads(batch=found.value)
            return found
        case "n_ubatch":
            most = min(bench.n_ubatch, bench.whole)
            return search(
                [size for size in _MICRO_BATCHES if size <= most],
                min(settings.number(name), most),
                bench.micro_batch,
                budget_s=budget_s,
                margin=UBATCH_SAME,
                fewest=False,
            )


def _small(model: Model, settings: Settings, machine: Machine) -> Settings:
    """The settings of a small context, with the largest micro-batch to try."""
    lib = model.lib
    trained = lib.llama_model_n_ctx_train(model.handle)
    n_ubatch = settings.number("n_ubatch")
    if "n_ubatch" in wanted(settings) and not (machine.gpus and settings.number("n_gpu_layers")):
        # Activations of one token: about 24 rows of n_embd floats (attention, and a feed-forward four times as wide).
        free = machine.available_bytes - lib.llama_model_size(model.handle)
        if 24 * 4 * lib.llama_model_n_embd(model.handle) * _MICRO_BATCHES[-1] < free // 8:
            n_ubatch = max(n_ubatch, _MICRO_BATCHES[-1])
    n_ctx = max(8, min(_N_CTX, trained or _N_CTX))
    values = {"n_ctx": n_ctx, "n_batch": n_ctx, "n_ubatch": min(n_ubatch, n_ctx)}
    return Settings(entries=tuple(replace(each, value=values.get(each.name, each.value)) for each in settings.entries))
