"""Tuning when a model has just been loaded for use: what is known is taken, what is not is measured once."""

from __future__ import annotations

from runtime.engine.model import Model
from runtime.interrupts import Interrupt
from runtime.settings import Settings
from runtime.tune.measure import OnSetting, measure
from runtime.tune.record import Tuning, keep, recorded, wanted
from runtime.tune.threads import apply
from toolchain.base.errors import FoundryError
from toolchain.base.gguf import GgufHeader
from toolchain.base.machine import Machine


def tuned(
    model: Model,
    settings: Settings,
    header: GgufHeader,
    machine: Machine,
    *,
    interrupt: Interrupt | None = None,
    on_setting: OnSetting | None = None,
) -> Settings:
    """``settings`` with the threads and the micro-batch that are best for the loaded ``model``.

    Takes seconds at the first start and nothing later; ``on_setting`` is called only when something is measured. What
    cannot be measured, for want of memory or because the library fails, keeps its computed value, and is tried
    ``ATTEMPTS`` times, once at each start. Raises KeyboardInterrupt once ``interrupt`` is raised. A context that
    exists already takes the threads by ``llama_set_n_threads``, and the micro-batch at the next start.
    """
    tuning = recorded(header, machine, settings)
    if tuning is None and wanted(settings):
        try:
            tuning = measure(model, settings, machine, interrupt=interrupt, on_setting=on_setting)
        except FoundryError:
            tuning = _failed(settings)
        tuning = keep(tuning, header, machine, settings)
    return apply(settings, tuning, machine)


def _failed(settings: Settings) -> Tuning:
    return Tuning(
        asked=wanted(settings), found={}, others=0.0, crowded=False, depth=0, batch=0, seconds=0.0, failed=True
    )
