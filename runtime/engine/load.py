"""A checked GGUF and settings -> an Engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from runtime.engine.context import Context, too_large
from runtime.engine.engine import Engine
from runtime.engine.model import Model
from runtime.engine.placement import apply_placement
from runtime.interrupts import Interrupt
from runtime.library import import_library, route_log
from runtime.library_log import OUT_OF_MEMORY
from runtime.settings import KV_TYPES, OUTPUT_ROWS, Settings, sequences_made
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME

KV_TYPE_IDS: Final = MappingProxyType({name: GGML_TYPES_BY_NAME[name.upper()].id for name in KV_TYPES})


def load(
    path: Path,
    settings: Settings,
    *,
    verbose: bool = False,
    interrupt: Interrupt | None = None,
    sequences: int = 1,
    refine: Callable[[Model, Settings], Settings] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Engine:
    """Load the checked GGUF at ``path``. ``interrupt`` ends the loading with KeyboardInterrupt.

    ``progress`` is told what share of the weights is in memory, 0 to 1, as often as that changes; it must not raise.
    ``sequences`` replies can be decoded together (``Engine.stream_many``, 16 at most); they share the context.
    ``refine`` may change the settings of the context once the model is in memory. The log then begins with what the
    library tells of this context, whatever ``refine`` did.

    Raises MissingError without a usable library, MemoryFitError when memory runs out, ArtifactError when the
    library refuses the file, UsageError when it refuses the settings.
    """
    model = load_model(path, settings, verbose=verbose, interrupt=interrupt, progress=progress)
    try:
        refined = refine(model, settings) if refine else settings
        return Engine(make_context(model, refined, sequences))
    except BaseException:
        model.close()
        raise


def load_model(
    path: Path,
    settings: Settings,
    *,
    verbose: bool = False,
    interrupt: Interrupt | None = None,
    progress: Callable[[float], None] | None = None,
) -> Model:
    """The weights and vocabulary alone; errors as of ``load``."""
    lib = import_library()
    log = route_log(lib, verbose)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    kept = apply_placement(lib, params, settings)

    def goes_on(done: float, _data: object) -> bool:
        if progress:
            progress(done)
        return not (interrupt and interrupt.raised)

    watch = lib.llama_progress_callback(goes_on) if interrupt or progress else None
    if watch:
        params.progress_callback = watch
    handle = lib.llama_model_load_from_file(os.fsencode(path), params)
    del kept  # the parameters pointed at it
    if interrupt and interrupt.raised:
        if handle:
            lib.llama_model_free(handle)
        raise KeyboardInterrupt
    if not handle:
        evidence = log.tail()
        if OUT_OF_MEMORY.search(evidence):
            raise too_large(f"{path.name} does not fit in memory", evidence)
        raise ArtifactError(
            f"the library refuses {path.name}",
            evidence=evidence,
            hint="the file may be made for a newer llama.cpp: see `./inv build --source`, or convert it again",
        )
    return Model(lib=lib, log=log, handle=handle, path=path)


def make_context(model: Model, settings: Settings, sequences: int = 1) -> Context:
    """A context of ``model``: MemoryFitError when its cache or buffers do not fit, UsageError when it is refused."""
    lib = model.lib
    model.log.begin()
    handle = lib.llama_init_from_model(model.handle, _context_params(lib, settings, sequences))
    if not handle:
        evidence = model.log.tail()
        if OUT_OF_MEMORY.search(evidence):
            raise too_large(f"the context of {settings.number('n_ctx')} tokens does not fit in memory", evidence)
        raise UsageError("the library refuses these settings", evidence=evidence)
    n_ctx = min(settings.number("n_ctx"), lib.llama_n_ctx(handle))  # the library rounds up to 256
    n_batch = lib.llama_n_batch(handle)
    return Context(model=model, handle=handle, n_ctx=n_ctx, n_batch=n_batch, settings=settings)


def _context_params(lib: Any, settings: Settings, sequences: int) -> Any:
    params = lib.llama_context_default_params()
    for name in ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"):
        setattr(params, name, settings.number(name))
    params.type_k = KV_TYPE_IDS[settings.text("type_k")]
    params.type_v = KV_TYPE_IDS[settings.text("type_v")]
    params.n_seq_max = sequences_made(sequences)
    if params.n_seq_max > 1:
        params.kv_unified = True  # cells for whichever sequence needs them, and shared beginnings stored once
    params.swa_full = False  # a sliding window keeps what it can see; the library's own tools do the same
    params.n_outputs_max = max(OUTPUT_ROWS, params.n_seq_max)  # rows of logits; the default reserves n_batch of them
    return params
