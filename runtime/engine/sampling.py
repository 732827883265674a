"""How the next token is drawn: options with llama.cpp's defaults, and the C sampler chain they make."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from toolchain.base.errors import UsageError

PENALTY_WINDOW: Final = 64
"""Tokens that a repeat penalty looks back over (``penalty_last_n`` in llama.cpp's common.h)."""

_SEEDS: Final = 2**32 - 1  # 0xFFFFFFFF means "random" to the library


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Defaults are llama.cpp's (``common_params_sampling``). ``temp`` 0 takes the likeliest token each time."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.temp <= 100, "--temp", self.temp, "a number from 0 (greedy) to 100")
        _require(0 <= self.top_k < 2**31, "--top-k", self.top_k, "a whole number; 0 turns it off")
        _require(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0, at most 1, which turns it off")
        _require(0 <= self.min_p < 1, "--min-p", self.min_p, "from 0, which turns it off, to below 1")
        _require(0 < self.repeat_penalty <= 10, "--repeat-penalty", self.repeat_penalty, "around 1.1; 1 turns it off")
        _require(0 <= self.seed < _SEEDS, "--seed", self.seed, f"from 0 to {_SEEDS - 1}")


def random_seed() -> int:
    """A seed that nobody chose; it is reported, so that the reply can be had again."""
    return secrets.randbelow(_SEEDS)


def build_chain(lib: Any, n_vocab: int, options: SamplingOptions, prompt: Sequence[int]) -> Any:
    """A sampler chain of the library, to be freed by the caller; order as in llama.cpp's own tools.

    A repeat penalty counts the end of ``prompt`` too.
    """
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        lib.llama_sampler_chain_add(chain, sampler)

    penalized = options.repeat_penalty != 1.0
    if penalized:
        add(lib.llama_sampler_init_penalties(n_vocab, PENALTY_WINDOW, options.repeat_penalty, 0.0, 0.0))
    if options.temp == 0:
        add(lib.llama_sampler_init_greedy())
    else:
        if options.top_k:
            add(lib.llama_sampler_init_top_k(options.top_k))
        if options.top_p < 1:
            add(lib.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p:
            add(lib.llama_sampler_init_min_p(options.min_p, 1))
        add(lib.llama_sampler_init_temp(options.temp))
        add(lib.llama_sampler_init_dist(options.seed))
    if penalized:
        for token in prompt[-PENALTY_WINDOW:]:
            lib.llama_sampler_accept(chain, token)
    return chain


def _require(fits: bool, option: str, value: float, wanted: str) -> None:
    if not fits:  # NaN fits nowhere
        raise UsageError(f"{option} cannot be {value}", hint=wanted)
