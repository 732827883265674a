"""From what was typed to a loaded model: resolve, check the header, settle the settings, load."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.engine import Engine
    from runtime.interrupts import Interrupt
    from runtime.settings import Settings
    from toolchain.base.gguf import GgufHeader


def prepare(arguments: argparse.Namespace) -> tuple[GgufHeader, Settings]:
    """The checked header of the model and the settings for it; nothing of the library is touched."""
    from runtime.memory.context_guard import require_context_fits
    from runtime.model_file import open_model
    from runtime.resolve import resolve
    from runtime.settings import NAMES, settle
    from runtime.tune.threads import tuned_threads
    from toolchain.base import machine

    resolved = resolve(arguments.model)
    header = open_model(resolved.path)
    here = machine.probe()
    settings = settle(
        machine=here,
        n_ctx_train=header.n_ctx_train,
        tuned=tuned_threads(here),
        recipe=resolved.runtime,
        env=os.environ,
        flags={name: getattr(arguments, name) for name in NAMES},
    )
    require_context_fits(header, settings, here)
    return header, settings


def load_engine(path: Path, settings: Settings, arguments: argparse.Namespace, interrupt: Interrupt) -> Engine:
    """The model in memory; warns when layers were meant for a GPU that this build cannot use."""
    from runtime.engine import load
    from toolchain.base import console

    engine = load(path, settings, verbose=arguments.verbose, interrupt=interrupt)
    if settings.number("n_gpu_layers") != 0 and not engine.offloads:
        console.warn("this build has no GPU backend, all layers run on the CPU: `./inv build --define GGML_CUDA=ON`")
    return engine
