"""A model in memory: loaded, told about, switched, closed."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from runtime.llama.tracked import Tracked
from runtime.settings import near_miss
from toolchain.base import console
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.interrupts import Interrupt
    from runtime.llama.asked import Lora
    from runtime.llama.describe import LoadResourceInfo, ModelMetaInfo
    from runtime.llama.finish import FinishMeta
    from runtime.prepare import Found, Prepared, Request
    from toolchain.base.chat_template import ChatTemplate
    from toolchain.base.gguf import GgufHeader


class Loaded(Tracked):
    """A model in memory, with the settings that were asked for and planned ones for the rest."""

    def __init__(
        self,
        model_path: str | Path,
        n_ctx: int = 2048,
        verbose: int = 0,
        n_threads: int = -1,
        n_gpu_layers: int | str = -1,
        quantize_format: str = "auto",
        is_70b: bool = False,
        *,
        n_threads_batch: int = -1,
        n_batch: int = -1,
        n_ubatch: int = -1,
        type_k: str | None = None,
        type_v: str | None = None,
        n_cpu_moe: int = -1,
        tensor_split: str | Sequence[float] | None = None,
        seed: int | None = None,
        lora: Lora | Sequence[Lora] = (),
        force_adapters: bool = False,
        tune: bool = True,
        system_message: str = "",
    ) -> None:
        """Find the model, plan, measure and load it.

        -1 (and None) means planned, and for threads measured once for this machine, model and build.

        - ``model_path``: a ``.gguf`` file, a recipe or its name, a GGUF repository on the hub (``owner/repo`` or
          ``owner/repo:QUANT``, downloaded), or a GGML ``.bin`` of 2023 (converted beside the original, once).
        - ``n_ctx``: tokens of context. The default is 2048, less where the model was trained with less, and gives way
          to a recipe's or ``FOUNDRY_N_CTX``; any other number is kept as it is, or refused. -1: planned.
        - ``verbose``: 0 quiet (but for warnings, for what takes long on first use, and a bar while the model loads, if
          stderr is a terminal), 1 the figures after each reply, 2 also the library's log; all on stderr.
        - ``n_threads``, ``n_threads_batch``: threads for generation and for prompts.
        - ``n_gpu_layers``: layers on the GPU, the output layer counting as one more; ``"all"``: all of them.
        - ``quantize_format``: ``"auto"``, or the quantization that is wanted (``"Q4_K_M"``). It chooses from a recipe
          or a repository; a file has to be what is said.
        - ``is_70b``: hold the model to be a Llama 70B. The file itself decides what it is; a wrong claim is an error.
        - ``n_batch``, ``n_ubatch``: tokens of a prompt per call, and per graph.
        - ``type_k``, ``type_v``: types of the cache, such as ``"f16"`` or ``"q8_0"``.
        - ``n_cpu_moe``: layers whose experts stay on the host; ``tensor_split``: shares of the layers by GPU.
        - ``seed``: of each reply that is given none; None or -1: drawn anew each time.
        - ``lora``: an adapter or several, each a file, ``"FILE=SCALE"`` or ``(file, scale)``.
        - ``force_adapters``: take adapters too that say that they were trained on another model, with a warning.
        - ``tune``: measure threads where that was never done (some seconds); ``FOUNDRY_NO_TUNE=1`` says no for all.
        - ``system_message``: how the conversation begins.

        Raises UsageError for a wrong path, value or claim, FetchError when a download fails, ArtifactError for a
        damaged file, MissingError without a build of llama.cpp (``./inv build``), MemoryFitError when it does not fit,
        with what would; KeyboardInterrupt on Ctrl-C.
        """
        from runtime.llama.asked import Asked, as_loras, as_settings, requested

        super().__init__(system_message)
        settings = {
            "n_threads": n_threads,
            "n_threads_batch": n_threads_batch,
            "n_gpu_layers": n_gpu_layers,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
            "type_k": type_k,
            "type_v": type_v,
            "n_cpu_moe": n_cpu_moe,
            "tensor_split": tensor_split,
        }
        self._asked = Asked(
            model_path=model_path,
            n_ctx=n_ctx,
            settings=as_settings(settings),
            quantize_format=quantize_format or "auto",
            is_70b=is_70b,
            lora=as_loras(lora),
            force_adapters=force_adapters,
            tune=tune,
            verbose=verbose,
        )
        self.verbose = verbose
        self.seed = seed
        self._running: Interrupt | None = None
        self._engine_now: Engine | None = None
        self._finish_meta: FinishMeta | None = None
        self._load(*requested(self._asked))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context; a second call does nothing.

        A reply that was left half-way ends here, as if its generator were closed. Raises UsageError while another
        thread is in the middle of one. The conversation stays, and ``reload()`` loads the model again.
        """
        self._gate.end()
        with self._gate.held("close"):
            self._free()

    def reload(
        self,
        model_path: str | Path | None = None,
        *,
        n_ctx: int | None = None,
        lora: Lora | Sequence[Lora] | None = None,
        verbose: int | None = None,
        **settings: int | str | Sequence[float] | None,
    ) -> None:
        """Load the model again, or another one, as the constructor would; what is not named stays as it was asked for.

        ``settings`` are those of the constructor by the same names (``n_threads=4``). The conversation, symbols and
        functions stay; the cache is empty. A wrong path, value or adapter leaves the old model as it is. It is freed
        before memory is planned for: when there is too little, none is loaded, and ``reload()`` brings the old one
        back. Errors are the constructor's.
        """
        from runtime.llama.asked import as_loras, as_settings, hold, requested

        asked = self._asked
        for name in settings:
            if name not in asked.settings:
                raise UsageError(f"there is no setting {name!r}", hint=near_miss(name, asked.settings))
        with self._gate.held("reload"):
            wanted = replace(
                asked,
                model_path=asked.model_path if model_path is None else model_path,
                n_ctx=asked.n_ctx if n_ctx is None else n_ctx,
                settings={**asked.settings, **as_settings(settings)},
                lora=asked.lora if lora is None else as_loras(lora),
                verbose=self.verbose if verbose is None else verbose,
                quantize_format=asked.quantize_format if model_path is None else "auto",
                is_70b=asked.is_70b and model_path is None,
            )
            found = requested(wanted)
            hold(*found)
            self.verbose = wanted.verbose
            self._free()
            self._load(*found)
            self._asked = wanted

    def cancel(self) -> None:
        """End the reply that is running, within a token; from another thread, a signal handler or a callback.

        Its ``finish_reason`` is then ``"cancelled"``, and what came is kept. Without a reply it does nothing.
        """
        if running := self._running:
            running.raised = True

    def set_adapters(self, *lora: Lora, force: bool = False) -> None:
        """Let exactly these LoRA adapters work from now on, each a file, ``"FILE=SCALE"`` or ``(file, scale)``.

        None turns all off. The model is not loaded again; the cache is emptied when anything changes. A later
        ``reload()`` keeps them. Raises UsageError and ArtifactError for a file that is no adapter of this model;
        ``force`` (or the constructor's ``force_adapters``) takes one that was trained on another too, with a warning.
        """
        from runtime.engine.adapters import parse_adapter
        from runtime.llama.asked import spelled_lora

        with self._gate.held("set_adapters"):
            engine = self._engine
            force = force or self._asked.force_adapters
            chosen = [
                (engine.load_adapter(path, force=force), scale)
                for path, scale in map(parse_adapter, map(spelled_lora, lora))
            ]
            engine.set_adapters(chosen)
            self._asked = replace(self._asked, lora=lora, force_adapters=force)

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self._engine.n_ctx

    @property
    def finish_meta(self) -> FinishMeta | None:
        """Figures of the last reply that ended; None before the first one and after one that failed."""
        return self._finish_meta

    @property
    def load_resource_info(self) -> LoadResourceInfo:
        """Bytes that the model takes on each device and by layer, as planned; see ``LoadResourceInfo``."""
        from runtime.llama.describe import resources

        planned = self._prepared.planned
        return resources(planned.headers, planned.plan, self._engine.settings)

    @property
    def model_meta_info(self) -> ModelMetaInfo:
        """What the header of the model's file says; see ``ModelMetaInfo``."""
        from runtime.llama.describe import model_info

        return model_info(self._prepared.planned.headers)

    @property
    def _engine(self) -> Engine:
        if self._engine_now is None:
            raise UsageError("this LLaMa has no model in memory: it was closed", hint="reload() loads it again")
        return self._engine_now

    def _free(self) -> None:
        if self._engine_now:
            self._engine_now = None
            self._closing()

    def _load(self, request: Request, found: Found) -> None:
        from runtime.interrupts import interrupts_noted
        from runtime.prepare import load_engine, prepare
        from toolchain.base.chat_template import chat_template

        prepared, template = prepare(request, found=found), chat_template(found.header)
        with _bar(prepared.planned.headers, self.verbose) as progress, interrupts_noted() as interrupt:
            engine = load_engine(prepared, request, interrupt, progress=progress)
        self._prepared: Prepared = prepared
        self._template: ChatTemplate = template
        self._engine_now, self._left_out = engine, []
        self._closing = weakref.finalize(self, engine.close)  # for one that is dropped and was never closed
        self._closing.atexit = False


@contextmanager
def _bar(headers: Sequence[GgufHeader], verbose: int) -> Iterator[Callable[[float], None] | None]:
    """A bar on a terminal while the model loads, a line when it is there where one is wanted."""
    if not verbose and not sys.stderr.isatty():
        yield None
        return
    with console.step(f"load {headers[0].path.name}", quiet_s=0.0 if verbose else math.inf) as step:
        total = sum(header.tensor_bytes for header in headers)
        yield lambda share: step.advance(int(share * total), total)
