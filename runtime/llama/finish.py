"""What is known of a reply when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from runtime.engine.logprobs import TokenLogprob
    from runtime.engine.reply import ReplyStats

FinishReason: TypeAlias = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class FunctionCall:
    """A call that the model wrote and that was carried out.

    ``text`` is the call as written, ``name`` the function's, ``result`` the value or the error as the text that went
    back to the model, ``failed`` whether the function raised.
    """

    name: str
    text: str
    result: str
    failed: bool


@dataclass(frozen=True, kw_only=True)
class FinishMeta:
    """Figures of the last reply.

    - ``finish_reason``: ``"stop"`` (the model ended it, or a stop text came), ``"length"`` (``max_tokens``),
      ``"context"`` (the context is full) or ``"cancelled"`` (``cancel()``, or the generator was left early).
    - ``prompt_tokens``, ``cached_tokens``: of the prompt, and how many of them were in the cache already; where
      functions were called, of the first prompt. All that follows is of the whole reply.
    - ``completion_tokens``: tokens of the reply.
    - ``prompt_ms``, ``generation_ms``: milliseconds for each of the two; ``first_token_ms``: until the first token.
    - ``tokens_per_second``, ``prompt_tokens_per_second``: of what was decoded in those times; 0 where nothing was.
    - ``seed``: the one it was drawn with; the same prompt and seed give the same reply, but for rounding, which depends
      on what the cache held before.
    - ``dropped_turns``: the oldest turns that had no room in the prompt (they stay in the conversation).
    - ``function_calls``: tuple of ``FunctionCall``, in their order.
    - ``logprobs``: tuple of ``(token, piece, logprob, top)``, one for each token, when ``logprobs`` were asked for;
      ``top`` is a tuple of ``(token, piece, logprob)``, best first. Natural logarithms of what the model itself
      says, before samplers and ``token_prob_*``; ``piece`` is bytes.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_ms: float
    generation_ms: float
    first_token_ms: float
    tokens_per_second: float
    prompt_tokens_per_second: float
    seed: int
    dropped_turns: int = 0
    function_calls: tuple[FunctionCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as a dictionary of its names."""
        return dict(vars(self))


def finish_meta(
    rounds: list[ReplyStats],
    *,
    max_tokens: int | None,
    seed: int,
    dropped_turns: int = 0,
    function_calls: tuple[FunctionCall, ...] = (),
    logprobs: tuple[TokenLogprob, ...] = (),
) -> FinishMeta:
    """Figures of a reply of one or more rounds: prompt figures of the first, generation of all."""
    first, last = rounds[0], rounds[-1]
    tokens = sum(each.completion_tokens for each in rounds)
    prompt_s = sum(each.prompt_seconds for each in rounds)
    generation_s = sum(each.generation_seconds for each in rounds)
    reason: FinishReason = last.finish_reason
    if reason == "length" and (max_tokens is None or tokens < max_tokens):
        reason = "context"
    return FinishMeta(
        finish_reason=reason,
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens,
        completion_tokens=tokens,
        prompt_ms=prompt_s * 1000,
        generation_ms=generation_s * 1000,
        first_token_ms=first.ttft_ms,
        tokens_per_second=_rate(sum(each.generation_steps for each in rounds), generation_s),
        prompt_tokens_per_second=_rate(sum(each.processed_tokens for each in rounds), prompt_s),
        seed=seed,
        dropped_turns=dropped_turns,
        function_calls=function_calls,
        logprobs=logprobs,
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
