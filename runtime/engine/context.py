"""The context: which tokens its cache holds, and the decodes that put them there.

The cache keeps what it holds between calls, and a prompt that begins with the same tokens pays only for the rest.
How far that goes, and why not to the last common token, is told in ``prefix``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from runtime.engine.model import Model
from runtime.engine.prefix import TILE_ROWS, Checkpoint, Checkpoints, common_prefix, resumable
from runtime.engine.reply import FinishReason
from runtime.interrupts import Interrupt
from runtime.library_log import OUT_OF_MEMORY
from toolchain.base.errors import FoundryError, MemoryFitError, UsageError

if TYPE_CHECKING:
    from runtime.engine.adapters import Adapter
    from runtime.settings import Settings

PARTIAL_ONLY: Final = 1
"""LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY of llama.h: the part of a state that cannot be cut."""

_ROPES_IN_SPACE: Final = (8, 40)  # GGML_ROPE_TYPE_MROPE and _IMROPE of ggml.h


class Context:
    """One llama_context and the tokens in its cache; ``close`` frees it and not the model.

    Numbers below 0 among the ``cached`` stand for positions of an image (``vision``); nothing can decode them again.
    ``exact`` counts the leading tokens of the cache that were computed as parts of a prompt, which gives the same
    bits each time; tokens of a reply were computed one by one. ``adapters`` are those at work, with their scales,
    ``settings`` those that it was made with.
    """

    def __init__(
        self, *, model: Model, handle: Any, n_ctx: int, n_batch: int, settings: Settings | None = None
    ) -> None:
        lib = model.lib
        self.model = model
        self.handle = handle
        self.n_ctx = n_ctx
        self.n_batch = n_batch
        self.settings = settings
        self.cached: list[int] = []
        self.exact = 0
        self.adapters: tuple[tuple[Adapter, float], ...] = ()
        self.checkpoints = Checkpoints()
        self.recurrent = bool(lib.llama_model_is_recurrent(model.handle) or lib.llama_model_is_hybrid(model.handle))
        self._memory = lib.llama_get_memory(handle)
        self._block: int = min(n_batch, lib.llama_n_ubatch(handle))
        self._most = self._block if self._offloads() else n_batch // self._block * self._block
        self._n_swa: int = lib.llama_model_n_swa(model.handle)
        self._forgets = self.recurrent or self._n_swa > 0
        self.in_space = lib.llama_model_rope_type(model.handle) in _ROPES_IN_SPACE
        """Whether an image has fewer positions than cells, so that the library cannot count on from its last one."""

    @property
    def rows_at_once(self) -> int:
        """Tokens of a micro-batch."""
        return self._block

    def close(self) -> None:
        """Free it; a second call does nothing, nor do ``keep``, ``clear`` and ``forget`` from then on."""
        if self.handle:
            self.model.lib.llama_free(self.handle)
        self.handle = self._memory = None

    def require_room(self, n_tokens: int) -> None:
        """Raise UsageError for a prompt that is empty or longer than the context."""
        if not n_tokens:
            raise UsageError("the prompt is empty, and this model has no token to begin with", hint="give it a word")
        if n_tokens > self.n_ctx:
            raise UsageError(
                f"the prompt has {n_tokens} tokens, the context holds {self.n_ctx}",
                hint=f"shorten it, or give --n-ctx {n_tokens + 256} if the model has so much",
            )

    def reuse(self, tokens: Sequence[int], images: Sequence[tuple[int, int]] = ()) -> int:
        """Keep of the cache what ``tokens`` can go on from; the number of tokens kept.

        ``images`` are the ranges of positions that stand for one each: it is kept whole or not at all.

        The last token is always decoded again, since its logits are wanted. Where all that is common was computed as
        part of a prompt, what follows has the bits of a run without a cache.
        """
        shared = min(common_prefix(self.cached, tokens), len(tokens) - 1)
        shared = next((start for start, end in images if start < shared < end), shared)
        text_end = images[0][0] if images else len(tokens)  # a cold run's pieces end there
        whole = shared > self.exact or (bool(images) and shared == text_end)
        count = shared if whole else resumable(shared, text_end, self._block)
        return self.keep(shared if self.recurrent or not self._window_reaches(count) else count)

    def keep(self, count: int) -> int:
        """Cut the cache after ``count`` tokens; the number kept, which is less where the model cannot go back there.

        A sliding window has dropped what it can no longer see, and cannot be entered again further back; a recurrent
        state holds its last token and no earlier one, but for its checkpoints.
        """
        lib, memory = self.model.lib, self._memory
        if not memory:  # a reply that was left may outlive the context
            return 0
        if count < len(self.cached) or lib.llama_memory_seq_pos_max(memory, 0) >= count:
            if not (count > 0 and self._window_reaches(count) and lib.llama_memory_seq_rm(memory, 0, count, -1)):
                count = self._back_to_checkpoint(count)
            self._cut(count)
        return count

    def clear(self) -> None:
        """Empty the cache."""
        if self._memory:
            self.model.lib.llama_memory_clear(self._memory, False)
        self._cut(0)

    def forget(self, sequence: int) -> None:
        """Take a sequence other than the first out of the cache."""
        if self._memory:
            self.model.lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def fill(self, tokens: Sequence[int], exact: int) -> bool:
        """Note that a state of ``tokens`` was put into the empty cache; False, and empty, if it is not in there."""
        if self.model.lib.llama_memory_seq_pos_max(self._memory, 0) != len(tokens) - 1:
            self.clear()
            return False
        self.cached[:] = tokens
        self.exact = exact
        return True

    def decode_prompt(self, tokens: Sequence[int], interrupt: Interrupt | None) -> bool:
        """Decode what is not cached, in pieces of ``n_batch``; False when interrupted (the cache stays right).

        The pieces end where those of a cold run end. With layers on a GPU each is one micro-batch, since there the
        library asks nobody whether to go on (``llama_set_abort_callback`` in llama.h: CPU only).
        """
        lib, handle = self.model.lib, self.handle
        first = len(self.cached)
        exact = first <= self.exact
        buffer = (ctypes.c_int32 * (len(tokens) - first))(*tokens[first:])
        watch = lib.ggml_abort_callback(lambda _data: interrupt.raised) if interrupt else None
        if watch:  # only here: it costs a call into Python per graph node, too much for single tokens
            lib.llama_set_abort_callback(handle, watch, None)
        try:
            while (start := len(self.cached)) < len(tokens):
                end = self._piece_end(start, len(tokens))
                at = ctypes.cast(ctypes.addressof(buffer) + 4 * (start - first), ctypes.POINTER(ctypes.c_int32))
                batch = lib.llama_batch_get_one(at, end - start)
                if self.in_space:
                    batch.pos = (ctypes.c_int32 * (end - start))(*range(start, end))
                if status := lib.llama_decode(handle, batch):
                    self.keep(start)
                    if self.stopped(status) == "length":
                        raise MemoryFitError(
                            "the cache has no room for the prompt",
                            evidence=self.model.log.tail(),
                            hint="raise --n-ctx",
                        )
                else:
                    self.cached.extend(tokens[start:end])
                    self.exact = end if exact else self.exact
                    self._note_checkpoint(len(tokens))
                if interrupt and interrupt.raised:
                    return False
            lib.llama_synchronize(handle)
            return True
        finally:
            if watch:
                lib.llama_set_abort_callback(handle, lib.ggml_abort_callback(), None)

    def extend(self, stand_ins: Sequence[int], length: int) -> None:
        """Note that a picture was decoded behind what the cache holds, in a prompt of ``length`` positions.

        Where the prompt ends so soon that no checkpoint would be made in it, one is made here.
        """
        self.cached.extend(stand_ins)
        if self._forgets and self._checkpoint_at(length) < len(self.cached):
            self._keep_state()

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

    def _offloads(self) -> bool:
        """Whether a part of the model is on a GPU, as far as its settings say."""
        on_gpu = self.settings is not None and self.settings.number("n_gpu_layers") != 0
        return on_gpu and bool(self.model.lib.llama_supports_gpu_offload())

    def _window_reaches(self, count: int) -> bool:
        """Whether the cache, cut after ``count`` tokens, still holds all that the next one sees."""
        oldest = self.model.lib.llama_memory_seq_pos_min(self._memory, 0)
        return count == len(self.cached) or bool(oldest <= max(0, count - self._n_swa))

    def _cut(self, count: int) -> None:
        del self.cached[count:]
        self.exact = min(self.exact, count)
        self.checkpoints.cut(count)

    def _piece_end(self, start: int, length: int) -> int:
        """Where the piece ends that begins at ``start``: on a micro-batch's border, or at the checkpoint to be made."""
        block = self._block
        end = start + (self._most if start % block == 0 else block - start % block)
        mark = self._checkpoint_at(length)
        return mark if start < mark < end else min(end, length)

    def _checkpoint_at(self, length: int) -> int:
        """The number of tokens of a prompt after which the state of a model that forgets is kept; 0: nowhere."""
        return max(0, length - TILE_ROWS) if self._forgets else 0

    def _note_checkpoint(self, length: int) -> None:
        if self.cached and len(self.cached) == self._checkpoint_at(length):
            self._keep_state()

    def _keep_state(self) -> None:
        lib, handle, count = self.model.lib, self.handle, len(self.cached)
        size = lib.llama_state_seq_get_size_ext(handle, 0, PARTIAL_ONLY)
        if size > self.checkpoints.limit_bytes:
            return
        state = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data_ext(handle, state, size, 0, PARTIAL_ONLY) == size:
            self.checkpoints.add(Checkpoint(tokens=count, state=bytes(state)))

    def _back_to_checkpoint(self, count: int) -> int:
        """Go back to the nearest checkpoint of at most ``count`` tokens, else to none; the number of tokens."""
        lib, handle, memory = self.model.lib, self.handle, self._memory
        if found := self.checkpoints.before(count):
            state = (ctypes.c_uint8 * len(found.state)).from_buffer_copy(found.state)
            if lib.llama_state_seq_set_data_ext(handle, state, len(found.state), 0, PARTIAL_ONLY) and (
                lib.llama_memory_seq_rm(memory, 0, found.tokens, -1)
            ):
                return found.tokens
        lib.llama_memory_clear(memory, False)
        return 0


def too_large(message: str, evidence: str) -> MemoryFitError:
    """The error of a load or a decode that ran out of memory, with what may help."""
    return MemoryFitError(
        message,
        evidence=evidence,
        hint="lower --n-ctx, give --type-k q8_0 --type-v q8_0, put fewer layers on the GPU (--n-gpu-layers), "
        "or take a smaller quantization",
    )
