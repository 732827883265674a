"""The loop per token: four C calls (sample, end-of-generation test, piece, decode) on buffers made once."""

from __future__ import annotations

import codecs
import ctypes
import time
from collections.abc import Generator, Sequence
from typing import Any, Final, NamedTuple

from runtime.engine.context import Context
from runtime.engine.reply import Chunk, FinishReason, StopSplitter
from runtime.interrupts import Interrupt

_PIECE_BYTES: Final = 256


class Outcome(NamedTuple):
    """How a generation went; ``first_at`` is when its first token was drawn."""

    finish: FinishReason
    tokens: int
    steps: int
    first_at: float


def generate(
    context: Context, chain: Any, limit: int, stops: Sequence[str], interrupt: Interrupt
) -> Generator[Chunk, None, Outcome]:
    """Up to ``limit`` tokens as text, never cut inside a character; how it went is the generator's value."""
    lib, handle, vocab = context.model.lib, context.handle, context.model.vocab
    sample, is_end = lib.llama_sampler_sample, lib.llama_vocab_is_eog
    to_piece, decode = lib.llama_token_to_piece, lib.llama_decode
    one = (ctypes.c_int32 * 1)()
    batch = lib.llama_batch_get_one(one, 1)
    piece: Any = (ctypes.c_char * _PIECE_BYTES)()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    to_text, remember = decoder.decode, context.cached.append
    splitter = StopSplitter(stops) if stops else None
    finish: FinishReason = "length"
    tokens = steps = 0
    first_at = time.perf_counter()
    while tokens < limit:
        token = sample(chain, handle, -1)
        if not tokens:
            first_at = time.perf_counter()
        if is_end(vocab, token):
            finish = "stop"
            break
        tokens += 1
        size = to_piece(vocab, token, piece, _PIECE_BYTES, 0, False)
        text = to_text(piece[:size] if size >= 0 else context.model.long_piece(token, -size))
        if splitter:
            text, found = splitter.feed(text)
            if found:
                if text:
                    yield Chunk(text)
                return Outcome("stop", tokens, steps, first_at)
        if text:
            yield Chunk(text)
        if tokens == limit:
            break
        if interrupt.raised:
            finish = "cancelled"
            break
        one[0] = token
        if status := decode(handle, batch):
            finish = context.stopped(status)
            break
        remember(token)
        steps += 1
    if rest := (splitter.flush() if splitter else "") + to_text(b"", True):
        yield Chunk(rest)
    return Outcome(finish, tokens, steps, first_at)
