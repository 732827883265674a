"""What answers a conversation: a model in this process, or a server elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from toolchain.base.errors import FetchError

if TYPE_CHECKING:
    from runtime.conversation.messages import Message
    from runtime.engine.sampling import SamplingOptions
    from runtime.interrupts import Interrupt


@dataclass(frozen=True, kw_only=True)
class ReplyOptions:
    """How a reply is drawn and where it ends. ``json_schema`` is the text of a schema that it has to follow."""

    sampling: SamplingOptions
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    json_schema: str | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of a reply when it has ended; a server need not tell all of it.

    ``finish_reason`` is ``stop``, ``length`` or ``cancelled``, or a server's own word.
    """

    finish_reason: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tps: float | None = None
    generation_tps: float | None = None
    ttft_ms: float | None = None
    threads: int | None = None


class ContextFullError(FetchError):
    """The conversation is longer than a server's context: it can be answered once turns are dropped."""


class Piece(NamedTuple):
    """Some of a reply; the last one carries the figures. ``reasoning`` is what the model says before it answers."""

    text: str = ""
    reasoning: str = ""
    figures: Figures | None = None


class Backend(Protocol):
    """Answers conversations; ``close`` gives back what it holds."""

    @property
    def name(self) -> str:
        """The model's name, as shown."""

    @property
    def n_ctx(self) -> int | None:
        """Tokens of context; None where nobody tells."""

    @property
    def sees(self) -> bool:
        """Whether messages may hold images."""

    def count(self, messages: Sequence[Message]) -> int | None:
        """Tokens of the prompt that the messages make; None where nobody tells."""

    def reply(
        self, messages: Sequence[Message], options: ReplyOptions, interrupt: Interrupt
    ) -> Generator[Piece, None, None]:
        """The reply as it comes; ``interrupt`` ends it within a token, with ``cancelled`` as its reason.

        Raises FoundryError: UsageError for what cannot be answered, FetchError when a server fails.
        """

    def close(self) -> None: ...


def figures_line(figures: Figures) -> str:
    """The one line of figures after a reply: what is known of them."""
    parts = []
    if figures.completion_tokens is not None:
        speed = "" if figures.generation_tps is None else f", {figures.generation_tps:.0f} t/s generation"
        parts.append(_counted(figures.completion_tokens, "token") + speed)
    if figures.prompt_tokens is not None:
        cached = "" if figures.cached_tokens is None else f" ({figures.cached_tokens} cached)"
        speed = "" if figures.prompt_tps is None else f", {figures.prompt_tps:.0f} t/s"
        parts.append(_counted(figures.prompt_tokens, "prompt token") + cached + speed)
    if figures.threads is not None:
        parts.append(_counted(figures.threads, "thread"))
    if figures.finish_reason == "length":
        parts.append("cut at the token limit or the end of the context")
    elif figures.finish_reason == "cancelled":
        parts.append("stopped")
    elif figures.finish_reason != "stop":
        parts.append(f"ended: {figures.finish_reason}")
    return "; ".join(parts)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
