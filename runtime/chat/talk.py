"""A conversation with a backend: its turns asked, tried again, edited and taken back; what fits is sent."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from runtime.chat.backend import Backend, ContextFullError, Figures, Piece, ReplyOptions
from runtime.conversation.fit import fit
from runtime.conversation.messages import Message, images_of, text_of, turns_of
from runtime.conversation.tracker import Conversation
from runtime.interrupts import Interrupt, interrupts_noted
from toolchain.base import console
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.chat.saved import SavedTalk

HOW_TO_SEE: Final = "a model here sees with its vision part (--mmproj FILE)"

_SEEDS: Final = 2**32 - 1  # as SamplingOptions has it


class Talk:
    """A conversation, what answers it, and how.

    ``images`` (data URLs) go with the next message. ``figures`` are those of the last reply. ``changed`` are called
    after each change of the conversation. ``session`` is where the talk is kept, if it is.
    """

    def __init__(self, backend: Backend, options: ReplyOptions, conversation: Conversation | None = None) -> None:
        self.backend = backend
        self.options = options
        self.conversation = Conversation() if conversation is None else conversation
        self.images: list[str] = []
        self.figures: Figures | None = None
        self.changed: list[Callable[[], None]] = []
        self.session: SavedTalk | None = None
        self._interrupt: Interrupt | None = None
        self._left_out = 0
        self._tries = 0
        self._used: int | None = None
        self._told_of_images = False

    def ask(self, text: str, images: Sequence[str] = ()) -> Generator[Piece, None, None]:
        """The reply to ``text`` as it comes, the last piece with its figures; the turn is kept.

        A turn that fails is not kept. One that is stopped (Ctrl-C in the main thread, ``stop``, or the generator
        closed) keeps what came, if anything did. Raises UsageError for a message that has no room or cannot be
        answered, and what the backend raises.
        """
        self._tries = 0
        yield from self._turn(_content(text, [*self.images, *images]))

    def retry(self) -> Generator[Piece, None, None]:
        """Another reply to the last message, with another seed; the one before stays if this fails."""
        turn = self._last_turn("there is no reply to try again")
        self._tries += 1
        yield from self._turn(turn[0]["content"], instead=len(turn))

    def edit(self, text: str) -> Generator[Piece, None, None]:
        """The reply to ``text`` in place of the last message, whose images stay; errors as of ``retry``."""
        turn = self._last_turn("there is no message to edit")
        self._tries = 0
        yield from self._turn(_content(text, images_of(turn[0])), instead=len(turn))

    def undo(self) -> Message:
        """Take the last turn back; its message of the user. UsageError when there is none."""
        turn = self._last_turn("there is no turn to take back")
        for _ in turn:
            self.conversation.pop()
        self._now_changed()
        return turn[0]

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self.conversation.reset()
        self.images.clear()
        self._now_changed()

    def set_system(self, text: str) -> None:
        """Another system message; an empty one is none."""
        self.conversation.system = text
        self._now_changed()

    def stop(self) -> None:
        """End the reply that is coming, within a token; for callers outside the main thread."""
        if self._interrupt:
            self._interrupt.raised = True

    def used_tokens(self) -> int | None:
        """Tokens of the context that the conversation takes; None where nobody tells. Counted once a change."""
        if not self.conversation.messages:
            return 0
        if self._used is None:
            self._used = self.backend.count(self._sent())
        return self._used

    def last_text(self) -> str:
        """The text of the user's last message; UsageError when there is none."""
        return text_of(self._last_turn("there is no message to edit")[0])

    def count_again(self) -> None:
        """After the backend was changed: what fits and how much is used is counted anew."""
        self._used = None
        self._left_out = 0
        self._told_of_images = False

    def _turn(self, content: Any, *, instead: int = 0) -> Generator[Piece, None, None]:
        """A turn with ``content`` as the user's message, in place of the last ``instead`` messages."""
        if images_of({"content": content}) and not self.backend.sees:
            without = "/undo takes the message back" if instead else "`/image -` takes the image away"
            raise UsageError(
                f"{self.backend.name} does not see, and the message holds an image",
                hint=f"{without}; {HOW_TO_SEE}",
            )
        left_out, self.figures = self._left_out, None
        said: list[str] = []
        try:
            with self.conversation.transaction():
                for _ in range(instead):
                    self.conversation.pop()
                self.conversation.add("user", content)
                try:
                    yield from self._answer(said)
                except GeneratorExit:  # whoever read has left
                    self.figures = self.figures or Figures(finish_reason="cancelled")
                if not said and self._was_stopped():
                    raise _NothingCame
                self.conversation.add("assistant", "".join(said).rstrip())
        except _NothingCame:
            self._left_out = left_out
            console.say("stopped before anything came: the turn is not kept")
            return
        except BaseException:
            self._left_out = left_out
            raise
        if not instead:
            self.images.clear()
        self._now_changed()
        if not said and self.figures and self.figures.finish_reason == "length":
            limit = self.options.max_tokens
            raises = "the context is full" if limit is None else f"{limit} tokens are the limit (/params max_tokens=N)"
            console.warn(f"no answer came: {raises}")
        if self.figures and self.figures.prompt_tokens is not None and self.figures.completion_tokens is not None:
            self._used = self.figures.prompt_tokens + self.figures.completion_tokens

    def _answer(self, said: list[str]) -> Generator[Piece, None, None]:
        """The backend's pieces; the answer's text is left in ``said``, its figures in ``figures``."""
        while True:
            messages = self._fitting()
            try:
                with (
                    interrupts_noted() as self._interrupt,
                    closing(self.backend.reply(messages, self._options(), self._interrupt)) as pieces,
                ):
                    for piece in pieces:
                        text = piece.text if said else piece.text.lstrip()
                        if text:
                            said.append(text)
                        self.figures = piece.figures or self.figures
                        yield piece._replace(text=text)
                return
            except ContextFullError:
                if said or not self._leave_out_more():
                    raise
            finally:
                self._interrupt = None

    def _options(self) -> ReplyOptions:
        """Those of the talk; each further try has the next seed, so that a seed still tells the whole talk."""
        sampling = self.options.sampling
        seed = (sampling.seed + self._tries) % _SEEDS
        return replace(self.options, sampling=replace(sampling, seed=seed))

    def _was_stopped(self) -> bool:
        return self.figures is not None and self.figures.finish_reason == "cancelled"

    def _fitting(self) -> list[Message]:
        """What is sent: all turns that leave a quarter of the context, or what the reply may take, to the reply."""
        n_ctx = self.backend.n_ctx
        if n_ctx is None:
            return self._sent()
        fitted = fit(
            self._visible(),
            count=lambda some: self.backend.count(some) or 0,  # what nobody counts is sent as it is
            n_ctx=n_ctx,
            reserve=min(self.options.max_tokens or n_ctx, n_ctx // 4),
            dropped=self._left_out,
        )
        if (lost := fitted.dropped_turns - self._left_out) > 0:
            turns = "turn was" if lost == 1 else f"{lost} turns were"
            console.warn(f"the oldest {turns} left out of the prompt: the context holds {n_ctx} tokens")
        self._left_out = fitted.dropped_turns
        return list(fitted.messages)

    def _leave_out_more(self) -> bool:
        """After a server that does not tell its context refused: a quarter of the turns fewer; False if one is left."""
        turns = len(self.conversation.turns()) - self._left_out
        if turns <= 1:
            return False
        lost = max(1, turns // 4)
        self._left_out += lost
        left = "turn was" if lost == 1 else f"{lost} turns were"
        console.warn(f"the oldest {left} left out of the prompt: the server finds it too long")
        return True

    def _sent(self) -> list[Message]:
        """The conversation without the turns that are left out."""
        messages = self._visible()
        turns = turns_of(messages)
        left_out = max(0, min(self._left_out, len(turns) - 1))
        system = [message for message in messages[:1] if message["role"] == "system"]
        return [*system, *(message for turn in turns[left_out:] for message in turn)]

    def _visible(self) -> Sequence[Message]:
        """The conversation, without its images for a model that does not see; told once."""
        messages = self.conversation.messages
        if self.backend.sees or not any(map(images_of, messages)):
            return messages
        if not self._told_of_images:
            self._told_of_images = True
            console.warn(f"{self.backend.name} does not see: the conversation's images are left out")
        return [{**each, "content": text_of(each)} if images_of(each) else each for each in messages]

    def _last_turn(self, otherwise: str) -> list[Message]:
        turns = self.conversation.turns()
        if not turns:
            raise UsageError(otherwise, hint="say something first")
        return list(turns[-1])

    def _now_changed(self) -> None:
        self._used = None
        for tell in self.changed:
            tell()


class _NothingCame(Exception):
    """A reply was stopped before its first word."""


def _content(text: str, images: Sequence[str]) -> Any:
    """The content of a message: the text, or parts where there are images."""
    if not images:
        return text
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [*parts, {"type": "text", "text": text}]
