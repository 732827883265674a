"""A backend without a model: tokens are characters, replies are given."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from runtime.chat.backend import Figures, Piece, ReplyOptions
from runtime.chat.talk import Talk
from runtime.conversation.messages import Message, images_of, text_of
from runtime.engine.sampling import SamplingOptions
from runtime.interrupts import Interrupt
from toolchain.base.errors import FetchError

OPTIONS = ReplyOptions(sampling=SamplingOptions(seed=7))


class Parrot:
    """Says ``replies`` in turn, the last one again and again; a prompt is each text in brackets.

    A reply may hold ``!``, where it fails, and ``^``, where Ctrl-C comes; ``(text)`` at its head is reasoning.
    """

    name = "parrot"

    def __init__(self, *replies: str, n_ctx: int | None = None, sees: bool = False) -> None:
        self.replies = list(replies or (" yes\n",))
        self.n_ctx = n_ctx
        self.sees = sees
        self.prompts: list[str] = []
        self.images: list[list[str]] = []
        self.options: list[ReplyOptions] = []
        self.closed = 0

    def count(self, messages: Sequence[Message]) -> int | None:
        return None if self.n_ctx is None else len(self._prompt(messages))

    def reply(
        self, messages: Sequence[Message], options: ReplyOptions, interrupt: Interrupt
    ) -> Generator[Piece, None, None]:
        self.prompts.append(self._prompt(messages))
        self.images.append([url for message in messages for url in images_of(message)])
        self.options.append(options)
        said = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if said.startswith("("):
            reasoning, _, said = said[1:].partition(")")
            yield Piece(reasoning=reasoning)
        for character in said:
            if character == "!":
                raise FetchError("the parrot flew away")
            interrupt.raised = interrupt.raised or character == "^"
            if interrupt.raised:
                break
            yield Piece(character)
        reason = "cancelled" if interrupt.raised else "stop"
        yield Piece(figures=Figures(finish_reason=reason, prompt_tokens=len(self.prompts[-1]), completion_tokens=1))

    def close(self) -> None:
        self.closed += 1

    def _prompt(self, messages: Sequence[Message]) -> str:
        return "".join(f"[{text_of(message)}]" for message in messages)


def talk_with(parrot: Parrot, *, system: str = "", options: ReplyOptions = OPTIONS) -> Talk:
    talk = Talk(parrot, options)
    if system:
        talk.set_system(system)
    return talk


def said(talk: Talk, text: str) -> str:
    """The text of the reply to ``text``."""
    return "".join(piece.text for piece in talk.ask(text))
