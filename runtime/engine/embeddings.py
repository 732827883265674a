"""Texts -> vectors: several texts per call of the library, each a sequence of its own.

A context that makes vectors differs from one that writes text: it pools, and it takes whole texts only, since the
library pools within one micro-batch. It is made for the longest text that came so far.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from runtime.engine.adapters import Adapter, apply_adapters
from runtime.engine.context import too_large
from runtime.engine.model import Model
from runtime.interrupts import Interrupt
from runtime.library_log import OUT_OF_MEMORY
from runtime.settings import Settings
from toolchain.base.errors import FoundryError, UsageError

Pooling: TypeAlias = Literal["mean", "cls", "last"]
"""How the vectors of a text's tokens become one: their mean, the first one's, the last one's."""

POOLING_IDS: Final = MappingProxyType({"mean": 1, "cls": 2, "last": 3})  # enum llama_pooling_type in llama.h
BATCH_TOKENS: Final = 512
"""Tokens per call, unless one text has more: a model with a vocabulary computes its logits for each of them."""
BATCH_TEXTS: Final = 64
"""Texts per call; the library's limit is 256 (LLAMA_MAX_SEQ)."""
EXACT_TOKENS: Final = 1024
"""Tokens per call up to which attention is computed in full. Flash attention rounds the keys of an encoder to 16 bits,
by other means for few rows than for many: a text's vector then depends on its company (2e-4 against 2e-6 on a small
BERT). Beyond that the full matrix, tokens squared for each head, would take too much memory."""

Vectors: TypeAlias = npt.NDArray[np.float32]


class Embedder:
    """Makes vectors with a loaded model; ``close`` frees its context and not the model.

    ``pooling`` None takes the model's own, or for a model without one the mean if each of its tokens sees all
    others, else the last token, the only one that has seen them all. ``check_room`` is called with the tokens and texts
    of each context before it is made, and may raise.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        *,
        pooling: Pooling | None = None,
        adapters: Sequence[tuple[Adapter, float]] = (),
        check_room: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.pooling: Pooling = pooling or default_pooling(model)
        self._settings = settings
        self._adapters = tuple(adapters)
        self._check_room = check_room
        self._context: Any = None
        self._room = 0

    def close(self) -> None:
        """Free it; a second call does nothing, and it can be used again."""
        if self._context:
            self.model.lib.llama_free(self._context)
        self._context, self._room = None, 0

    @property
    def n_embd(self) -> int:
        """Numbers of a vector."""
        return int(self.model.lib.llama_model_n_embd_out(self.model.handle))

    @property
    def longest(self) -> int:
        """Tokens that a text may have."""
        return self._settings.number("n_ctx")

    def tokenize(self, texts: Sequence[str], *, truncate: bool = False, first: int = 1) -> list[list[int]]:
        """Tokens of each text within the special ones that the model wants around it.

        Raises UsageError that names the text, counted from ``first``, which is empty or too long; with
        ``truncate`` such a one is cut before its last special token.
        """
        return [self._tokens(number, text, truncate) for number, text in enumerate(texts, first)]

    def embed(
        self, tokens: Sequence[Sequence[int]], *, normalize: bool = True, interrupt: Interrupt | None = None
    ) -> Vectors:
        """One vector for each text of tokens, [n_texts, n_embd]; ``normalize`` makes their length 1.

        Fewer rows, those of the first texts, when ``interrupt`` is raised meanwhile.
        """
        vectors = np.zeros((len(tokens), self.n_embd), np.float32)
        self._require_room(max(map(len, tokens), default=0))
        for first, last in self._batches(tokens):
            if interrupt and interrupt.raised:
                vectors = vectors[:first]
                break
            vectors[first:last] = self._decode(tokens[first:last])
        if normalize:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors /= np.where(lengths > 0, lengths, 1)
        return vectors

    def _tokens(self, number: int, text: str, truncate: bool) -> list[int]:
        tokens = self.model.tokenize_framed(text)
        shown = text if len(text) <= 40 else text[:39] + "…"
        if not tokens:
            raise UsageError(
                f"text {number} is empty, and this model has no token to begin with", hint="leave empty texts out"
            )
        if len(tokens) > self.longest:
            if not truncate:
                raise UsageError(
                    f"text {number} has {len(tokens)} tokens, the model takes {self.longest} here",
                    evidence=shown,
                    hint="--truncate cuts it; a larger --n-ctx takes it if the model has so much",
                )
            closing = self._closing(tokens)
            tokens = [*tokens[: self.longest - len(closing)], *closing]
        return tokens

    def _closing(self, tokens: Sequence[int]) -> Sequence[int]:
        lib, vocab = self.model.lib, self.model.vocab
        return tokens[-1:] if tokens[-1] in (lib.llama_vocab_sep(vocab), lib.llama_vocab_eos(vocab)) else ()

    def _batches(self, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Runs of texts that fit one call, as (first, behind the last)."""
        first = total = 0
        texts = self._texts_per_call()
        for at, text in enumerate(tokens):
            if at > first and (total + len(text) > self._room or at - first == texts):
                yield first, at
                first, total = at, 0
            total += len(text)
        if first < len(tokens):
            yield first, len(tokens)

    def _texts_per_call(self) -> int:
        lib, handle = self.model.lib, self.model.handle
        # A recurrent state is as large for a short text as for a long one, and its micro-batches cut texts.
        return 1 if lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle) else BATCH_TEXTS

    def _require_room(self, longest: int) -> None:
        """A context for texts of up to ``longest`` tokens."""
        if self._context and longest <= self._room:
            return
        self.close()
        self._room = max(BATCH_TOKENS, 1 << max(0, longest - 1).bit_length())
        self._room = max(longest, min(self._room, self.longest))
        if self._check_room:
            self._check_room(self._room, self._texts_per_call())
        self._context = make_embedding_context(
            self.model, self._settings, pooling=self.pooling, tokens=self._room, texts=self._texts_per_call()
        )
        if self._adapters:
            apply_adapters(self.model.lib, self._context, self._adapters)

    def _decode(self, texts: Sequence[Sequence[int]]) -> Vectors:
        lib, context = self.model.lib, self._context
        if memory := lib.llama_get_memory(context):
            lib.llama_memory_clear(memory, False)
        batch = lib.llama_batch_init(sum(map(len, texts)), 0, 1)
        try:
            at = 0
            for sequence, text in enumerate(texts):
                for position, token in enumerate(text):
                    batch.token[at], batch.pos[at] = token, position
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                    batch.logits[at] = True
                    at += 1
            batch.n_tokens = at
            status = (lib.llama_decode if memory else lib.llama_encode)(context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status:
            evidence = self.model.log.tail()
            if OUT_OF_MEMORY.search(evidence):
                raise too_large("no memory left for the vectors", evidence)
            raise FoundryError(
                f"the library failed to embed (status {status})",
                evidence=evidence,
                hint="--verbose shows the library's log",
            )
        rows = [lib.llama_get_embeddings_seq(context, sequence) for sequence in range(len(texts))]
        return np.array([np.ctypeslib.as_array(row, (self.n_embd,)) for row in rows], np.float32)


def make_embedding_context(model: Model, settings: Settings, *, pooling: Pooling, tokens: int, texts: int) -> Any:
    """A llama_context that pools up to ``texts`` texts of ``tokens`` tokens in all; errors as of ``make_context``."""
    lib = model.lib
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = tokens
    params.n_seq_max = texts
    params.kv_unified = True  # texts of any lengths share the cells
    params.n_threads = settings.number("n_threads_batch")
    params.n_threads_batch = settings.number("n_threads_batch")
    params.embeddings = True
    params.pooling_type = POOLING_IDS[pooling]
    if tokens <= EXACT_TOKENS:
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
    handle = lib.llama_init_from_model(model.handle, params)
    if not handle:
        evidence = model.log.tail()
        if OUT_OF_MEMORY.search(evidence):
            raise too_large(f"a context for texts of {tokens} tokens does not fit in memory", evidence)
        raise UsageError(
            "the library refuses to embed with this model",
            evidence=evidence,
            hint="--verbose shows the library's log; take a model that is made for embedding",
        )
    return handle


def default_pooling(model: Model) -> Pooling:
    """What the model's header names, else mean for one whose tokens see each other and last for one that writes."""
    architecture = _metadata(model, "general.architecture")
    named = _metadata(model, f"{architecture}.pooling_type")
    for name, number in POOLING_IDS.items():
        if named == str(number):
            return name  # type: ignore[return-value]
    return "mean" if _metadata(model, f"{architecture}.attention.causal") == "false" else "last"


def _metadata(model: Model, key: str) -> str:
    """The value of ``key`` as text; empty where the header has none."""
    buffer = bytearray(256)
    size = model.lib.llama_model_meta_val_str(
        model.handle, key.encode(), (ctypes.c_char * len(buffer)).from_buffer(buffer), len(buffer)
    )
    return buffer[: max(0, size)].decode("utf-8", "replace")
