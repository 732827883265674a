"""What is measured: a model, its settings, the prompt's tokens, how many tokens to generate."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from runtime.settings import Setting, Settings
from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader

PROMPT_TOKENS: Final = 512
"""As llama-bench has it when nothing is asked."""

_TURN_S: Final = 1.0
_MOST_REPLIES: Final = 10
_NORMAL: Final = 1  # LLAMA_TOKEN_TYPE_NORMAL in llama.h


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens that are in the cache before, that the prompt adds, and that are generated after it."""

    depth: int
    prompt: int
    gen: int

    @property
    def n_ctx(self) -> int:
        """The context that this takes; the last token drawn counts, though it is not decoded."""
        return self.depth + self.prompt + self.gen + 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model at one depth. ``tokens`` are those of the depth, then those of the prompt.

    ``repeat``: so many replies make up a turn, whose figures are their medians.
    """

    model: Path
    settings: Settings
    tokens: tuple[int, ...]
    lengths: Lengths
    repeat: int = 1

    def to_json(self) -> str:
        return json.dumps(
            {
                "model": str(self.model),
                "settings": self.settings.as_json(),
                "tokens": self.tokens,
                "lengths": vars(self.lengths),
                "repeat": self.repeat,
            }
        )


def parse_case(text: str) -> Case:
    """What ``Case.to_json`` wrote."""
    raw = json.loads(text)
    return Case(
        model=Path(raw["model"]),
        settings=Settings(entries=tuple(Setting(**entry) for entry in raw["settings"])),
        tokens=tuple(raw["tokens"]),
        lengths=Lengths(**raw["lengths"]),
        repeat=raw["repeat"],
    )


def fitting_lengths(n_ctx_train: int | None, *, depth: int, prompt: int | None, gen: int) -> Lengths:
    """The lengths asked for; a prompt nobody asked for (None) is 512 tokens, or what the model's context leaves.

    Raises UsageError when they exceed the context that the model was trained with.
    """
    room = PROMPT_TOKENS if n_ctx_train is None else n_ctx_train - depth - gen - 1
    lengths = Lengths(depth=depth, prompt=max(1, min(PROMPT_TOKENS, room)) if prompt is None else prompt, gen=gen)
    if n_ctx_train is not None and lengths.n_ctx > n_ctx_train:
        raise UsageError(
            f"depth {depth}, {lengths.prompt} prompt tokens and {gen} generated ones are more than the model's "
            f"context of {n_ctx_train}",
            hint="lower --depth, --prompt-tokens or --gen-tokens",
        )
    return lengths


def with_own_context(settings: Settings) -> Settings:
    """The settings with the true reason for the context's length, when nobody asked for one."""
    told = replace(settings["n_ctx"], origin="default", reason="what depth, prompt and generation take")
    return Settings(entries=tuple(told if each.name == "n_ctx" else each for each in settings.entries))


def random_prompt(header: GgufHeader, count: int, seed: int) -> tuple[int, ...]:
    """``count`` tokens of the model's vocabulary by chance, behind its BOS if it has one.

    No control tokens, which could end a reply at once; the same ``seed`` gives the same tokens.
    """
    kinds = header.metadata.get("tokenizer.ggml.token_type")
    known = range(header.n_vocab or 1)
    # Sequences of numbers only; a vocabulary without types has no control tokens to avoid.
    usable: Sequence[int] = known
    if isinstance(kinds, memoryview):
        usable = [token for token in known if token < len(kinds) and kinds[token] == _NORMAL] or known
    tokens = random.Random(seed).choices(usable, k=count)
    bos = header.metadata.get("tokenizer.ggml.bos_token_id")
    if type(bos) is int and header.metadata.get("tokenizer.ggml.add_bos_token") is not False:
        tokens[0] = bos
    return tuple(tokens)


def make_case(header: GgufHeader, settings: Settings, lengths: Lengths, seed: int) -> Case:
    """The case with a random prompt; children run elsewhere, so its path is absolute."""
    tokens = random_prompt(header, lengths.depth + lengths.prompt, seed)
    return Case(model=header.path.absolute(), settings=settings, tokens=tokens, lengths=lengths)


def shortened(case: Case, gen: int) -> Case:
    """The same with fewer tokens to generate."""
    return replace(case, lengths=replace(case.lengths, gen=gen))


def repeated(case: Case, reply_seconds: float) -> Case:
    """The same with as many replies in a turn as take about a second, at most ten: short ones are noisy."""
    return replace(case, repeat=max(1, min(_MOST_REPLIES, int(_TURN_S / max(reply_seconds, 1e-9)))))
