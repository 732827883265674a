"""What our generation loop costs per token beyond the two calls without which no token comes.

The bare loop below calls ``llama_sampler_sample`` and ``llama_decode`` through ctypes and does nothing else, on the
same context, prompt and tokens. Both loops make these two calls through ctypes, so what the calls themselves cost
(some microseconds) is in both and cancels: against a loop compiled from C the figure would be that much larger.
tests/benchmarks/engine_overhead.py measures against real C. What is left is text (end-of-generation test, piece,
decoding, stop strings) and the Python between the calls.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Sequence
from typing import Final

from runtime.bench.case import Case
from runtime.engine import Engine
from runtime.engine.reply import ReplyStats
from runtime.engine.sampling import SamplingOptions
from toolchain.base.errors import FoundryError

_GREEDY: Final = SamplingOptions(temp=0)
_BUDGET_S: Final = 2.0  # for pairs of runs; at least one is made
_MOST_PAIRS: Final = 15


def overhead_us_per_token(engine: Engine, case: Case) -> float:
    """Median over pairs of runs, in turns: (our seconds - the bare loop's) / tokens, in microseconds.

    May come out below zero where tokens are so slow that noise exceeds it.
    """
    gen = case.lengths.gen
    differences: list[float] = []
    began = time.perf_counter()
    while not differences or (time.perf_counter() - began < _BUDGET_S and len(differences) < _MOST_PAIRS):
        if len(differences) % 2:
            bare = bare_seconds(engine, case.tokens, gen)
            ours = our_seconds(engine, case.tokens, gen)
        else:
            ours = our_seconds(engine, case.tokens, gen)
            bare = bare_seconds(engine, case.tokens, gen)
        differences.append((ours - bare) / gen * 1e6)
    return statistics.median(differences)


def our_seconds(engine: Engine, tokens: Sequence[int], gen: int) -> float:
    """Seconds in which ``Engine.stream`` draws ``gen`` + 1 tokens and decodes ``gen``."""
    return reply(engine, tokens, gen + 1).generation_seconds


def bare_seconds(engine: Engine, tokens: Sequence[int], gen: int) -> float:
    """Seconds in which the bare loop does the same, behind the same prompt."""
    context, lib = engine.context, engine.model.lib
    context.reuse(tokens)
    context.decode_prompt(tokens, None)
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    handle, sample, decode = context.handle, lib.llama_sampler_sample, lib.llama_decode
    one = (ctypes.c_int32 * 1)()
    batch = lib.llama_batch_get_one(one, 1)
    status = 0
    began = time.perf_counter()
    for _ in range(gen):
        one[0] = sample(chain, handle, -1)
        status |= decode(handle, batch)
    sample(chain, handle, -1)
    seconds = time.perf_counter() - began
    lib.llama_sampler_free(chain)
    context.keep(len(context.cached))  # the cache holds more than the context was told
    if status:
        raise FoundryError(
            "the library failed to decode",
            evidence=engine.model.log.tail(),
            hint="--verbose shows the library's log; try a smaller --n-ctx",
        )
    return seconds


def reply(engine: Engine, tokens: Sequence[int], max_tokens: int) -> ReplyStats:
    """The figures of a greedy reply, whose text is thrown away; no token of it is guessed ahead."""
    stats = None
    for chunk in engine.stream(tokens, _GREEDY, max_tokens=max_tokens, lookup=False):
        stats = chunk.stats
    assert stats is not None
    return stats
