"""What the rest of the runtime uses: a loaded model with one context, streaming replies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from runtime.engine.context import Context
from runtime.engine.generate import Outcome, generate
from runtime.engine.reply import Chunk, ReplyStats
from runtime.engine.sampling import SamplingOptions, build_chain
from runtime.interrupts import Interrupt


class Engine:
    """A loaded model with one context. Made by ``load``; ``close`` frees both."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.model = context.model

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        self.context.close()
        self.model.close()

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self.context.n_ctx

    @property
    def offloads(self) -> bool:
        """Whether this build of the library can use a GPU at all."""
        return bool(self.model.lib.llama_supports_gpu_offload())

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text`` with special tokens parsed, and with the BOS that the model wants exactly once."""
        return self.model.tokenize(text)

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
        context = self.context
        context.require_room(tokens)
        started = time.perf_counter()
        cached_tokens = context.reuse(tokens)
        whole = context.decode_prompt(tokens, interrupt)
        prompt_done = time.perf_counter()
        processed_tokens = len(context.cached) - cached_tokens
        room = self.n_ctx - len(tokens) + 1  # the last token needs no place: it is never decoded
        limit = room if max_tokens is None else min(room, max_tokens)
        chain = build_chain(self.model.lib, self.model.n_vocab, sampling, tokens)
        try:
            if whole:
                outcome = yield from generate(context, chain, limit, stops, interrupt or Interrupt())
            else:
                outcome = Outcome("cancelled", 0, 0, prompt_done)
        finally:
            self.model.lib.llama_sampler_free(chain)
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
