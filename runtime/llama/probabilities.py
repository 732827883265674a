"""Logits and probabilities of chosen tokens set from outside, at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine.logprobs import Adjust
    from runtime.engine.model import Model


def adjustment(
    model: Model,
    *,
    banned: tuple[int, ...] = (),
    delta: Mapping[int | str, float] | None = None,
    absolute: Mapping[int | str, float] | None = None,
) -> Adjust | None:
    """What bans ``banned``, then adds ``delta`` to logits, then gives tokens their ``absolute`` probabilities.

    None when there is nothing to do. Raises UsageError for a token that the model does not have, a text that is
    several tokens, a delta that is no number or +inf, probabilities out of range or of a sum above 1.
    """
    deltas = _by_token(model, delta or {}, "token_prob_delta")
    shares = _by_token(model, absolute or {}, "token_prob_abs")
    for token, value in deltas.items():
        if math.isnan(value) or value == math.inf:
            raise UsageError(f"token_prob_delta of token {token} cannot be {value}", hint="a number; -inf bans it")
    for token, value in shares.items():
        if not 0 <= value <= 1:
            raise UsageError(f"token_prob_abs of token {token} cannot be {value}", hint="a probability, from 0 to 1")
    if (total := sum(shares.values())) > 1 + 1e-9:
        raise UsageError(f"the probabilities of token_prob_abs add up to {total:.6g}", hint="1 is the most")
    if both := [token for token in shares if token in banned]:
        raise UsageError(f"token {both[0]} ends the generation, which endless bans", hint="leave one of them out")
    if not (banned or deltas or shares):
        return None
    ban = np.array(banned, np.intp)
    at, more = np.array([*deltas], np.intp), np.array([*deltas.values()], np.float32)
    bans = bool(banned) or -math.inf in deltas.values()

    def adjust(logits: NDArray[np.float32]) -> None:
        logits[ban] = -np.inf
        logits[at] += more
        if shares:
            set_probabilities(logits, shares)
        if bans and logits.max() == -np.inf:
            raise UsageError("no token is left to go on with", hint="ban fewer tokens by token_prob_delta")

    return adjust


def _by_token(model: Model, given: Mapping[int | str, float], where: str) -> dict[int, float]:
    try:
        return {token_of(model, key, where): float(value) for key, value in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{where} is no mapping of tokens to numbers", evidence=str(error)) from error


def set_probabilities(logits: NDArray[np.float32], shares: Mapping[int, float]) -> None:
    """Change ``logits`` so that their softmax has ``shares``; the other tokens keep their proportions."""
    tokens = np.array([*shares], np.intp)
    left = 1.0 - sum(shares.values())
    with np.errstate(divide="ignore"):
        wanted = np.log(np.array([*shares.values()], np.float64))
    logits[tokens] = -np.inf
    most = float(logits.max())
    if left <= 1e-9 or most == -math.inf:  # nothing is left for the others, or there are none
        logits[:] = -np.inf
        logits[tokens] = wanted
        return
    rest = most + math.log(float(np.exp(logits - most, dtype=np.float64).sum()))
    logits[tokens] = wanted - math.log(left) + rest


def token_of(model: Model, key: int | str, where: str) -> int:
    """The token of that id, or the one that is exactly that text; UsageError when there is none."""
    if isinstance(key, int):
        if not 0 <= key < model.n_vocab:
            raise UsageError(f"{where} names token {key}", hint=f"this model's tokens are 0 to {model.n_vocab - 1}")
        return key
    raw = key.encode("utf-8", "replace")
    tokens = model.tokenize_bare(key)
    if len(tokens) == 1 and model.named_piece(tokens[0]) == raw:
        return tokens[0]
    # A text alone may be cut otherwise than within a sentence: SentencePiece puts a space before it.
    if (same := model.by_piece.get(raw)) is not None:
        return same
    parts = [model.named_piece(token).decode("utf-8", "replace") for token in tokens]
    raise UsageError(
        f"{where}: {key!r} is {len(tokens)} tokens of this model, not one",
        evidence=f"{parts}",
        hint="give a token's id",
    )
