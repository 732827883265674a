"""How the next token is drawn: options with llama.cpp's names and defaults, and the C sampler chain they make."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from runtime.engine.model import Model
from toolchain.base.errors import UsageError

MIROSTAT_M: Final = 100
"""Tokens from which mirostat 1 estimates its exponent (llama.cpp's common/sampling.cpp)."""

_SEEDS: Final = 2**32 - 1  # 0xFFFFFFFF means "random" to the library
_LARGE: Final = 2**31


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Defaults are llama.cpp's (``common_params_sampling`` in common/common.h), names those of its options.

    ``temp`` 0 takes the likeliest token each time. ``logit_bias`` adds to the logits of tokens by their ids; -inf
    bans one. ``grammar`` is GBNF that the reply has to follow; ``json_schema.py`` makes one of a schema.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical: float = 1.0
    top_nsigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exp: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_lr: float = 0.1
    mirostat_ent: float = 5.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    grammar: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.temp <= 100, "--temp", self.temp, "a number from 0 (greedy) to 100")
        _require(0 <= self.top_k < _LARGE, "--top-k", self.top_k, "a whole number; 0 turns it off")
        _require(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0, at most 1, which turns it off")
        _require(0 <= self.min_p < 1, "--min-p", self.min_p, "from 0, which turns it off, to below 1")
        _require(0 < self.typical <= 1, "--typical", self.typical, "above 0, at most 1, which turns it off")
        _require(-1 <= self.top_nsigma <= 100, "--top-nsigma", self.top_nsigma, "around 1; -1 turns it off")
        _require(0 <= self.xtc_probability <= 1, "--xtc-probability", self.xtc_probability, "0 (off) to 1")
        _require(0 <= self.xtc_threshold <= 1, "--xtc-threshold", self.xtc_threshold, "0 to 0.5; more turns it off")
        _require(0 <= self.dynatemp_range <= 100, "--dynatemp-range", self.dynatemp_range, "from 0, which turns it off")
        _require(0 < self.dynatemp_exp <= 100, "--dynatemp-exp", self.dynatemp_exp, "a number above 0")
        _require(0 < self.repeat_penalty <= 10, "--repeat-penalty", self.repeat_penalty, "around 1.1; 1 turns it off")
        _require(0 <= self.repeat_last_n < _LARGE, "--repeat-last-n", self.repeat_last_n, "0 (off) or more")
        _require(abs(self.frequency_penalty) <= 100, "--frequency-penalty", self.frequency_penalty, "-2 to 2; 0: off")
        _require(abs(self.presence_penalty) <= 100, "--presence-penalty", self.presence_penalty, "-2 to 2; 0: off")
        _require(0 <= self.dry_multiplier <= 100, "--dry-multiplier", self.dry_multiplier, "around 0.8; 0 turns it off")
        _require(1 <= self.dry_base <= 100, "--dry-base", self.dry_base, "1 or more")
        _require(0 <= self.dry_allowed_length < _LARGE, "--dry-allowed-length", self.dry_allowed_length, "0 or more")
        _require(0 <= self.dry_penalty_last_n < _LARGE, "--dry-penalty-last-n", self.dry_penalty_last_n, "0 or more")
        _require(self.mirostat in (0, 1, 2), "--mirostat", self.mirostat, "0 (off), 1 or 2")
        _require(0 <= self.mirostat_lr <= 1, "--mirostat-lr", self.mirostat_lr, "0 to 1")
        _require(0 < self.mirostat_ent <= 100, "--mirostat-ent", self.mirostat_ent, "a number above 0")
        _require(0 <= self.seed < _SEEDS, "--seed", self.seed, f"from 0 to {_SEEDS - 1}")
        for token, bias in self.logit_bias.items():
            fits = not math.isnan(bias) and bias != math.inf
            _require(fits, "--logit-bias", f"{token}={bias}", "a number; -inf bans the token")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as it stands: no logit is touched, nothing is drawn."""
        return self.takes_best and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty comes before the samplers that choose."""
        penalized = self.repeat_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(penalized or self.dry_multiplier or self.logit_bias)

    @property
    def begins_with_top_k(self) -> bool:
        """Whether nothing but the K likeliest tokens matters."""
        cuts = self.top_k > 0 and self.top_nsigma <= 0 and not self.mirostat
        return cuts and not self.takes_best and not self.changes_logits

    @property
    def takes_best(self) -> bool:
        """Samplers that only cut the tail never lose the likeliest token; these two and mirostat may."""
        return self.temp == 0 and not self.mirostat and self.typical == 1 and not self.xtc_probability


def random_seed() -> int:
    """A seed that nobody chose; it is reported, so that the reply can be had again."""
    return secrets.randbelow(_SEEDS)


def build_chain(model: Model, options: SamplingOptions, prompt: Sequence[int]) -> Any:
    """A sampler chain of the library, to be freed by the caller; order as in llama.cpp's common/sampling.cpp.

    Penalties count the end of ``prompt`` too. The grammar is not in it: see ``draw.py``. Raises UsageError for a
    biased token that the model does not have.
    """
    if (alien := next((token for token in options.logit_bias if not 0 <= token < model.n_vocab), None)) is not None:
        raise UsageError(f"--logit-bias names token {alien}", hint=f"this model's tokens are 0 to {model.n_vocab - 1}")
    lib = model.lib
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for sampler in _samplers(model, options):
        lib.llama_sampler_chain_add(chain, sampler)
    window = max(options.repeat_last_n, options.dry_penalty_last_n)
    for token in prompt[-window:] if window else ():
        lib.llama_sampler_accept(chain, token)
    return chain


def _samplers(model: Model, options: SamplingOptions) -> list[Any]:
    lib, n_vocab = model.lib, model.n_vocab
    made = []
    if options.logit_bias:
        pairs = [lib.llama_logit_bias(token, bias) for token, bias in options.logit_bias.items()]
        made.append(lib.llama_sampler_init_logit_bias(n_vocab, len(pairs), (lib.llama_logit_bias * len(pairs))(*pairs)))
    if options.mirostat:
        made.append(lib.llama_sampler_init_temp(options.temp))
        seed, tau, eta = options.seed, options.mirostat_ent, options.mirostat_lr
        if options.mirostat == 1:
            return [*made, lib.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, MIROSTAT_M)]
        return [*made, lib.llama_sampler_init_mirostat_v2(seed, tau, eta)]
    repeat, frequency, presence = options.repeat_penalty, options.frequency_penalty, options.presence_penalty
    if repeat != 1 or frequency or presence:
        made.append(lib.llama_sampler_init_penalties(n_vocab, options.repeat_last_n, repeat, frequency, presence))
    if options.dry_multiplier:
        breakers = [text.encode() for text in options.dry_sequence_breakers if text]
        made.append(
            lib.llama_sampler_init_dry(
                model.vocab,
                options.dry_multiplier,
                options.dry_base,
                options.dry_allowed_length,
                options.dry_penalty_last_n,
                (ctypes.c_char_p * len(breakers))(*breakers),
                len(breakers),
            )
        )
    if not options.takes_best:
        made.extend(_filters(lib, options))
    if options.temp == 0:
        return [*made, lib.llama_sampler_init_greedy()]
    made.append(lib.llama_sampler_init_temp_ext(options.temp, options.dynatemp_range, options.dynatemp_exp))
    return [*made, lib.llama_sampler_init_dist(options.seed)]


def _filters(lib: Any, options: SamplingOptions) -> list[Any]:
    """The samplers that leave only some candidates."""
    made = []
    if options.top_nsigma > 0:
        made.append(lib.llama_sampler_init_top_n_sigma(options.top_nsigma))
    if options.top_k:
        made.append(lib.llama_sampler_init_top_k(options.top_k))
    if options.typical < 1:
        made.append(lib.llama_sampler_init_typical(options.typical, 0))
    if options.top_p < 1:
        made.append(lib.llama_sampler_init_top_p(options.top_p, 0))
    if options.min_p:
        made.append(lib.llama_sampler_init_min_p(options.min_p, 0))
    if options.xtc_probability:
        made.append(lib.llama_sampler_init_xtc(options.xtc_probability, options.xtc_threshold, 0, options.seed))
    return made


def _require(fits: bool, option: str, value: object, wanted: str) -> None:
    if not fits:  # NaN fits nowhere
        raise UsageError(f"{option} cannot be {value}", hint=wanted)
