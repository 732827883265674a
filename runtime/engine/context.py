"""The context: which tokens its cache holds, and the decodes that put them there.

The cache keeps what it holds between calls, and a prompt that begins with the same tokens pays only for the rest.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any, Final

from runtime.engine.model import Model
from runtime.engine.reply import FinishReason
from runtime.interrupts import Interrupt
from toolchain.base.errors import FoundryError, MemoryFitError, UsageError

OUT_OF_MEMORY: Final = re.compile(r"failed to allocate|unable to allocate|out of memory|cudaMalloc", re.IGNORECASE)
"""How the library's log says that memory ran out."""


class Context:
    """One llama_context and the tokens in its cache; ``close`` frees it and not the model."""

    def __init__(self, *, model: Model, handle: Any, n_ctx: int, n_batch: int) -> None:
        self.model = model
        self.handle = handle
        self.n_ctx = n_ctx
        self.n_batch = n_batch
        self.cached: list[int] = []
        self._memory = model.lib.llama_get_memory(handle)

    def close(self) -> None:
        """Free it; a second call does nothing."""
        if self.handle:
            self.model.lib.llama_free(self.handle)
        self.handle = None

    def require_room(self, tokens: Sequence[int]) -> None:
        """Raise UsageError for a prompt that is empty or longer than the context."""
        if not tokens:
            raise UsageError("the prompt is empty, and this model has no token to begin with", hint="give it a word")
        if len(tokens) > self.n_ctx:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx}",
                hint=f"shorten it, or give --n-ctx {len(tokens) + 256} if the model has so much",
            )

    def reuse(self, tokens: Sequence[int]) -> int:
        """Keep of the cache what ``tokens`` begins with; the number of tokens kept.

        The last token is always decoded again, since its logits are wanted.
        """
        same = 0
        most = min(len(self.cached), len(tokens) - 1)
        while same < most and self.cached[same] == tokens[same]:
            same += 1
        return self.keep(same)

    def keep(self, count: int) -> int:
        """Cut the cache after ``count`` tokens, or empty it where the model cannot take back a part."""
        lib, memory = self.model.lib, self._memory
        if count < len(self.cached) or lib.llama_memory_seq_pos_max(memory, 0) >= count:
            kept = count > 0 and lib.llama_memory_seq_rm(memory, 0, count, -1)
            # A sliding window has dropped its beginning and cannot be entered again there.
            if not kept or lib.llama_memory_seq_pos_min(memory, 0) > 0:
                lib.llama_memory_clear(memory, False)
                count = 0
            del self.cached[count:]
        return count

    def decode_prompt(self, tokens: Sequence[int], interrupt: Interrupt | None) -> bool:
        """Decode what is not cached, in pieces of ``n_batch``; False when interrupted (the cache stays right)."""
        lib, handle = self.model.lib, self.handle
        todo = tokens[len(self.cached) :]
        buffer = (ctypes.c_int32 * len(todo))(*todo)
        watch = lib.ggml_abort_callback(lambda _data: interrupt.raised) if interrupt else None
        if watch:  # only here: it costs a call into Python per graph node, too much for single tokens
            lib.llama_set_abort_callback(handle, watch, None)
        try:
            for start in range(0, len(todo), self.n_batch):
                size = min(self.n_batch, len(todo) - start)
                at = ctypes.cast(ctypes.addressof(buffer) + 4 * start, ctypes.POINTER(ctypes.c_int32))
                status = lib.llama_decode(handle, lib.llama_batch_get_one(at, size))
                if status == 0:
                    self.cached.extend(todo[start : start + size])
                else:
                    self.keep(len(self.cached))
                    if self.stopped(status) == "length":
                        raise MemoryFitError(
                            "the cache has no room for the prompt",
                            evidence=self.model.log.tail(),
                            hint="raise --n-ctx",
                        )
                if interrupt and interrupt.raised:
                    return False
            lib.llama_synchronize(handle)
            return True
        finally:
            if watch:
                lib.llama_set_abort_callback(handle, lib.ggml_abort_callback(), None)

    def stopped(self, status: int) -> FinishReason:
        """What a decode's status other than 0 means (llama.h): 1 no room, 2 aborted, below 0 an error."""
        if status == 1:
            return "length"
        if status == 2:
            return "cancelled"
        evidence = self.model.log.tail()
        if OUT_OF_MEMORY.search(evidence):
            raise too_large("no memory left to go on", evidence)
        raise FoundryError(f"the library failed to decode (status {status})", evidence=evidence)


def too_large(message: str, evidence: str) -> MemoryFitError:
    """The error of a load or a decode that ran out of memory, with what may help."""
    return MemoryFitError(
        message,
        evidence=evidence,
        hint="lower --n-ctx, give --type-k q8_0 --type-v q8_0, put fewer layers on the GPU (--n-gpu-layers), "
        "or take a smaller quantization",
    )
