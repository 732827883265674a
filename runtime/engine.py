"""Loads a model and streams tokens through the C API.

The loop per token is four C calls (sample, end-of-generation test, piece, decode) on buffers made once; it
asks Python for nothing else. The cache keeps what it holds between calls, and a prompt that begins with the
same tokens pays only for the rest.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import re
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, NamedTuple

from runtime.interrupts import Interrupt
from runtime.library import import_library, route_log
from runtime.library_log import LibraryLog
from runtime.reply import Chunk, FinishReason, ReplyStats, StopSplitter
from runtime.sampling import SamplingOptions, build_chain
from runtime.settings import Settings
from toolchain.base.errors import ArtifactError, FoundryError, MemoryFitError, UsageError

# enum ggml_type in ggml.h
_KV_TYPE_IDS: Final = MappingProxyType(
    {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
)
_INT32_MAX: Final = 2**31 - 1
_PIECE_BYTES: Final = 256  # longer pieces exist (runs of spaces); they take a second call
_OUT_OF_MEMORY: Final = re.compile(r"failed to allocate|unable to allocate|out of memory|cudaMalloc", re.IGNORECASE)


class Engine:
    """A loaded model with one context. Made by ``load``; ``close`` frees both."""

    def __init__(self, *, lib: Any, log: LibraryLog, model: Any, context: Any, n_ctx: int, n_batch: int) -> None:
        self.n_ctx = n_ctx
        self._lib = lib
        self._log = log
        self._model = model
        self._context = context
        self._n_batch = n_batch
        self._vocab = lib.llama_model_get_vocab(model)
        self._memory = lib.llama_get_memory(context)
        self._cached: list[int] = []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def offloads(self) -> bool:
        """Whether this build of the library can use a GPU at all."""
        return bool(self._lib.llama_supports_gpu_offload())

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text`` with special tokens parsed, and with the BOS that the model wants exactly once."""
        lib, raw = self._lib, text.encode("utf-8", "replace")
        # No tokenizer makes more tokens than bytes, but for a prefix space and the like.
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        count = lib.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), False, True)
        if -_INT32_MAX <= count < -len(buffer):  # INT32_MIN: more than the library can count
            buffer = (ctypes.c_int32 * -count)()
            count = lib.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), False, True)
        if count < 0:
            raise UsageError(f"the prompt of {len(raw)} bytes cannot be tokenized", hint="shorten it")
        tokens = list(buffer[:count])
        bos = lib.llama_vocab_bos(self._vocab)
        if bos >= 0 and lib.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def stream(
        self,
        tokens: Sequence[int],
        sampling: SamplingOptions,
        *,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
        interrupt: Interrupt | None = None,
    ) -> Iterator[Chunk]:
        """Pieces of the reply to the prompt ``tokens`` as they come; the last chunk carries the statistics.

        Ends at the model's end of generation, at a stop string, after ``max_tokens`` (None: no limit), when the
        context is full, or within one token after ``interrupt`` was raised. Raises UsageError when the prompt
        is empty or leaves no room.
        """
        self._require_room(tokens)
        lib = self._lib
        started = time.perf_counter()
        cached_tokens = self._reuse(tokens)
        whole = self._decode_prompt(tokens, interrupt)
        prompt_done = time.perf_counter()
        processed_tokens = len(self._cached) - cached_tokens
        room = self.n_ctx - len(tokens) + 1  # the last token needs no place: it is never decoded
        limit = room if max_tokens is None else min(room, max_tokens)
        chain = build_chain(lib, lib.llama_vocab_n_tokens(self._vocab), sampling, tokens)
        try:
            if whole:
                outcome = yield from self._generate(chain, limit, stops, interrupt or Interrupt())
            else:
                outcome = _Outcome("cancelled", 0, 0, prompt_done)
        finally:
            lib.llama_sampler_free(chain)
        stats = ReplyStats(
            prompt_tokens=len(tokens),
            cached_tokens=cached_tokens,
            processed_tokens=processed_tokens,
            completion_tokens=outcome.tokens,
            generation_steps=outcome.steps,
            prompt_seconds=prompt_done - started,
            generation_seconds=time.perf_counter() - prompt_done,
            ttft_ms=(outcome.first_at - started) * 1000,
            finish_reason=outcome.finish,
        )
        yield Chunk("", stats)

    def _generate(
        self, chain: Any, limit: int, stops: Sequence[str], interrupt: Interrupt
    ) -> Generator[Chunk, None, _Outcome]:
        """Up to ``limit`` tokens as text, never cut inside a character; how it went is the generator's value."""
        lib, context, vocab = self._lib, self._context, self._vocab
        sample, is_end = lib.llama_sampler_sample, lib.llama_vocab_is_eog
        to_piece, decode = lib.llama_token_to_piece, lib.llama_decode
        one = (ctypes.c_int32 * 1)()
        batch = lib.llama_batch_get_one(one, 1)
        piece: Any = (ctypes.c_char * _PIECE_BYTES)()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        to_text, remember = decoder.decode, self._cached.append
        splitter = StopSplitter(stops) if stops else None
        finish: FinishReason = "length"
        tokens = steps = 0
        first_at = time.perf_counter()
        while tokens < limit:
            token = sample(chain, context, -1)
            if not tokens:
                first_at = time.perf_counter()
            if is_end(vocab, token):
                finish = "stop"
                break
            tokens += 1
            size = to_piece(vocab, token, piece, _PIECE_BYTES, 0, False)
            text = to_text(piece[:size] if size >= 0 else self._long_piece(token, -size))
            if splitter:
                text, found = splitter.feed(text)
                if found:
                    if text:
                        yield Chunk(text)
                    return _Outcome("stop", tokens, steps, first_at)
            if text:
                yield Chunk(text)
            if tokens == limit:
                break
            if interrupt.raised:
                finish = "cancelled"
                break
            one[0] = token
            if status := decode(context, batch):
                finish = self._stopped(status)
                break
            remember(token)
            steps += 1
        if rest := (splitter.flush() if splitter else "") + to_text(b"", True):
            yield Chunk(rest)
        return _Outcome(finish, tokens, steps, first_at)

    def _require_room(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise UsageError("the prompt is empty, and this model has no token to begin with", hint="give it a word")
        if len(tokens) > self.n_ctx:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx}",
                hint=f"shorten it, or give --n-ctx {len(tokens) + 256} if the model has so much",
            )

    def _reuse(self, tokens: Sequence[int]) -> int:
        """Keep of the cache what ``tokens`` begins with; the number of tokens kept.

        The last token is always decoded again, since its logits are wanted.
        """
        same = 0
        most = min(len(self._cached), len(tokens) - 1)
        while same < most and self._cached[same] == tokens[same]:
            same += 1
        return self._keep(same)

    def _keep(self, count: int) -> int:
        """Cut the cache after ``count`` tokens, or empty it where the model cannot take back a part."""
        lib, memory = self._lib, self._memory
        if count < len(self._cached) or lib.llama_memory_seq_pos_max(memory, 0) >= count:
            kept = count > 0 and lib.llama_memory_seq_rm(memory, 0, count, -1)
            # A sliding window has dropped its beginning and cannot be entered again there.
            if not kept or lib.llama_memory_seq_pos_min(memory, 0) > 0:
                lib.llama_memory_clear(memory, False)
                count = 0
            del self._cached[count:]
        return count

    def _decode_prompt(self, tokens: Sequence[int], interrupt: Interrupt | None) -> bool:
        """Decode what is not cached, in pieces of ``n_batch``; False when interrupted (the cache stays right)."""
        lib, context = self._lib, self._context
        todo = tokens[len(self._cached) :]
        buffer = (ctypes.c_int32 * len(todo))(*todo)
        watch = lib.ggml_abort_callback(lambda _data: interrupt.raised) if interrupt else None
        if watch:  # only here: it costs a call into Python per graph node, too much for single tokens
            lib.llama_set_abort_callback(context, watch, None)
        try:
            for start in range(0, len(todo), self._n_batch):
                size = min(self._n_batch, len(todo) - start)
                at = ctypes.cast(ctypes.addressof(buffer) + 4 * start, ctypes.POINTER(ctypes.c_int32))
                status = lib.llama_decode(context, lib.llama_batch_get_one(at, size))
                if status == 0:
                    self._cached.extend(todo[start : start + size])
                else:
                    self._keep(len(self._cached))
                    if self._stopped(status) == "length":
                        raise MemoryFitError(
                            "the cache has no room for the prompt", evidence=self._log.tail(), hint="raise --n-ctx"
                        )
                if interrupt and interrupt.raised:
                    return False
            lib.llama_synchronize(context)
            return True
        finally:
            if watch:
                lib.llama_set_abort_callback(context, lib.ggml_abort_callback(), None)

    def _stopped(self, status: int) -> FinishReason:
        """What a decode's status other than 0 means (llama.h): 1 no room, 2 aborted, below 0 an error."""
        if status == 1:
            return "length"
        if status == 2:
            return "cancelled"
        evidence = self._log.tail()
        if _OUT_OF_MEMORY.search(evidence):
            raise _too_large("no memory left to go on", evidence)
        raise FoundryError(f"the library failed to decode (status {status})", evidence=evidence)

    def _long_piece(self, token: int, size: int) -> bytes:
        buffer = (ctypes.c_char * size)()
        self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
        return bytes(buffer)


class _Outcome(NamedTuple):
    """How a generation went; ``first_at`` is when its first token was drawn."""

    finish: FinishReason
    tokens: int
    steps: int
    first_at: float


def load(path: Path, settings: Settings, *, verbose: bool = False, interrupt: Interrupt | None = None) -> Engine:
    """Load the checked GGUF at ``path``. ``interrupt`` ends the loading with KeyboardInterrupt.

    Raises MissingError without a usable library, MemoryFitError when memory runs out, ArtifactError when the
    library refuses the file, UsageError when it refuses the settings.
    """
    lib = import_library()
    log = route_log(lib, verbose)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = settings.number("n_gpu_layers")
    watch = lib.llama_progress_callback(lambda _done, _data: not interrupt.raised) if interrupt else None
    if watch:
        params.progress_callback = watch
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if interrupt and interrupt.raised:
        if model:
            lib.llama_model_free(model)
        raise KeyboardInterrupt
    if not model:
        evidence = log.tail()
        if _OUT_OF_MEMORY.search(evidence):
            raise _too_large(f"{path.name} does not fit in memory", evidence)
        raise ArtifactError(
            f"the library refuses {path.name}",
            evidence=evidence,
            hint="the file may be made for a newer llama.cpp: see `./inv build --source`, or convert it again",
        )
    context = lib.llama_init_from_model(model, _context_params(lib, settings))
    if not context:
        lib.llama_model_free(model)
        evidence = log.tail()
        if _OUT_OF_MEMORY.search(evidence):
            raise _too_large(f"the context of {settings.number('n_ctx')} tokens does not fit in memory", evidence)
        raise UsageError("the library refuses these settings", evidence=evidence)
    n_ctx = min(settings.number("n_ctx"), lib.llama_n_ctx(context))  # the library rounds up to 256
    return Engine(lib=lib, log=log, model=model, context=context, n_ctx=n_ctx, n_batch=lib.llama_n_batch(context))


def _context_params(lib: Any, settings: Settings) -> Any:
    params = lib.llama_context_default_params()
    for name in ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"):
        setattr(params, name, settings.number(name))
    params.type_k = _KV_TYPE_IDS[settings.text("type_k")]
    params.type_v = _KV_TYPE_IDS[settings.text("type_v")]
    params.n_outputs_max = 1  # only the last token's logits are read; the default reserves n_batch rows of them
    return params


def _too_large(message: str, evidence: str) -> MemoryFitError:
    return MemoryFitError(
        message,
        evidence=evidence,
        hint="lower --n-ctx, give --type-k q8_0 --type-v q8_0, put fewer layers on the GPU (--n-gpu-layers), "
        "or take a smaller quantization",
    )
