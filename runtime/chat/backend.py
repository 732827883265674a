"""What answers a conversation: a model in this process, or a server elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

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
