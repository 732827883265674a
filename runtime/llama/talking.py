"""Replies to the tracked conversation: prompt, stream, calls of functions, and what is kept."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Unpack

from runtime.conversation.calls import find_call
from runtime.conversation.fit import Fitted, fit
from runtime.conversation.functions import Call, Result
from runtime.conversation.messages import Message, images_of, text_of, turns_of
from runtime.conversation.preserved import MARKER, PreservedSplitter
from runtime.conversation.tracker import Conversation
from runtime.llama.finish import FunctionCall
from runtime.llama.native import Native, Told
from runtime.llama.options import Drawn, ReplyArguments
from toolchain.base.errors import ArtifactError, UsageError

MAX_FUNCTION_CALLS: Final = 8
_RESERVE_SHARE: Final = 4  # a quarter of the context is kept free for the reply, unless it is to be shorter


class Talking(Native):
    """Chat by the model's own template."""

    def create_completion(
        self,
        prompt: str | Sequence[Message] | None = None,
        *,
        functions: bool = True,
        max_function_calls: int = MAX_FUNCTION_CALLS,
        preserve: str | None = MARKER,
        **options: Unpack[ReplyArguments],
    ) -> str:
        """The reply of the assistant; arguments and errors as of ``create_generator``."""
        return "".join(
            self.create_generator(
                prompt, functions=functions, max_function_calls=max_function_calls, preserve=preserve, **options
            )
        )

    def create_generator(
        self,
        prompt: str | Sequence[Message] | None = None,
        *,
        functions: bool = True,
        max_function_calls: int = MAX_FUNCTION_CALLS,
        preserve: str | None = MARKER,
        **options: Unpack[ReplyArguments],
    ) -> Generator[str, None, None]:
        """A generator of the assistant's reply, in pieces as it comes, never cut inside a character.

        ``prompt`` is the user's next message (symbols in it are expanded); None answers the conversation as it stands;
        a list of messages is answered by itself, and the tracked conversation has no part in it. ``options`` are those
        of ``ReplyArguments``.

        The user's message and the reply are kept in the conversation. When the call fails, it is as it was before;
        when the generator is left or ``cancel()`` ends it, what came is kept. Of a conversation that is too long for
        the context, the oldest turns are left out of the prompt, whole turns, so that a quarter of the context, or
        ``max_tokens`` if that is less, is free for the reply; ``finish_meta.dropped_turns`` tells how many.

        - ``functions``: registered functions are told of in the system message, and a call in the reply is carried
          out: the reply is cut behind it, the result goes back to the model as a further message, and the reply goes
          on in a new line, for ``max_function_calls`` calls at most (further ones stay text). ``max_tokens`` is for
          all of it together, a grammar or schema for each part.
          ``finish_meta.function_calls`` has them.
        - ``preserve``: what stands between two of these marks, both included, comes in one piece; None: nothing does.

        At once it raises UsageError for wrong options; at its first step UsageError when the last message alone has no
        room, when there is nothing to answer or another reply is running, and ArtifactError when the model's template
        fails. KeyboardInterrupt on Ctrl-C.
        """
        drawn = self._drawn(options)
        calls = max_function_calls if functions else 0
        splitter = PreservedSplitter(preserve) if preserve else None

        def body() -> Generator[str, None, None]:
            told = Told()
            with self._telling(told, drawn):
                yield from self._answered(prompt, drawn, told, calls=calls, tells=functions, splitter=splitter)

        return self._gate.streamed(body, "no second reply")

    def build_prompt(
        self,
        prompt: str | Sequence[Message] | None = None,
        *,
        functions: bool = True,
        max_tokens: int | None = None,
    ) -> str:
        """The text that ``create_completion`` with these arguments would hand to the model; nothing is kept.

        It ends where the assistant's reply begins. Errors as of ``create_generator``.
        """
        with self._gate.held("build_prompt"):
            asked_of = self._asked_of(prompt)
            conversation, left_out = Conversation(asked_of.messages), self._left_out_of(asked_of)
            self._add_asked(conversation, prompt)
            fitted, _ = self._fitted(conversation.messages, left_out, max_tokens, tells=functions)
            return self._rendered(fitted.messages)

    def _answered(
        self,
        prompt: str | Sequence[Message] | None,
        drawn: Drawn,
        told: Told,
        *,
        calls: int,
        tells: bool,
        splitter: PreservedSplitter | None,
    ) -> Generator[str, None, None]:
        """The reply in rounds, each but the last ending in a call; its messages are kept, or none of them."""
        conversation = self._asked_of(prompt)
        left_out = self._left_out_of(conversation)
        try:
            with conversation.transaction():
                self._add_asked(conversation, prompt)
                while True:
                    said = _Said(finds=len(told.calls) < calls)
                    try:
                        fitted, tokens = self._fitted(conversation.messages, left_out, drawn.max_tokens, tells=tells)
                    except UsageError:
                        if not told.calls:
                            raise
                        told.ended("length")  # the results of functions filled the context
                        break
                    told.dropped_turns = fitted.dropped_turns
                    try:
                        if told.calls:
                            yield "\n"
                        yield from self._round(tokens, drawn, told, said, splitter)
                    except GeneratorExit:
                        said.left = True
                    if said.text or not (said.left or told.interrupt.raised):
                        conversation.add("assistant", said.text.rstrip())
                    elif not told.calls:
                        raise _NothingCameError
                    if said.call is None or said.left or told.interrupt.raised:
                        break
                    result = self._functions.call(said.call)
                    conversation.add("tool", result.text, name=said.call.name)
                    told.calls.append(_carried_out(said.call, result))
                    if drawn.max_tokens is not None and told.tokens >= drawn.max_tokens:
                        told.ended("length")
                        break
                    if told.interrupt.raised:
                        break
                if conversation is self._conversation:
                    self._left_out = conversation.turns()[: told.dropped_turns]
        except _NothingCameError:
            return

    def _round(
        self, tokens: Sequence[int], drawn: Drawn, told: Told, said: _Said, splitter: PreservedSplitter | None
    ) -> Generator[str, None, None]:
        """Text up to the end of the reply, or of the first call in it; ``said`` has what was handed out."""
        with closing(self._streamed(tokens, drawn, told, stops=self._template.stops)) as stream:
            for each in stream:
                piece = each if said.raw else each.lstrip()
                said.raw += piece
                if said.finds and ")" in piece:
                    said.call, said.settled = find_call(said.raw, self._functions, settled=said.settled)
                    if said.call:
                        piece = piece[: said.call.end - len(said.raw) or None]
                for part in splitter.feed(piece) if splitter else [piece] if piece else []:
                    said.text += part
                    yield part
                if said.call:
                    break
        for part in splitter.flush() if splitter else []:
            said.text += part
            yield part

    def _asked_of(self, prompt: str | Sequence[Message] | None) -> Conversation:
        """The conversation that goes on: the tracked one, or an empty one for messages that stand by themselves."""
        return self._conversation if prompt is None or isinstance(prompt, str) else Conversation()

    def _left_out_of(self, conversation: Conversation) -> list[list[Message]]:
        """The turns that the last prompt of ``conversation`` left out; none of one that stands by itself."""
        return self._left_out if conversation is self._conversation else []

    def _add_asked(self, conversation: Conversation, prompt: str | Sequence[Message] | None) -> None:
        """Add the messages of ``prompt``, symbols in the user's replaced; UsageError when none is there to answer."""
        given: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or ()
        if not isinstance(given, Sequence):
            raise UsageError(f"{prompt!r} is neither a text nor a list of messages")
        self._add(conversation, given)
        if not conversation.messages or conversation.messages[-1]["role"] not in ("user", "tool"):
            raise UsageError("there is no message to answer", hint="give a prompt, or add_message('user', ...)")

    def _fitted(
        self, messages: Sequence[Message], left_out: list[list[Message]], max_tokens: int | None, *, tells: bool
    ) -> tuple[Fitted, Sequence[int]]:
        """What of ``messages`` goes into the prompt, and its tokens.

        Turns that the last prompt left out stay out where ``messages`` begin with them: the cache has what follows.
        """
        engine, known = self._engine, dict[int, list[int]]()

        def count(kept: Sequence[Message]) -> int:
            known[len(kept)] = engine.tokenize(self._rendered(kept))
            return len(known[len(kept)])

        n_ctx = engine.n_ctx
        fitted = fit(
            self._with_system(messages, tells=tells),
            count=count,
            n_ctx=n_ctx,
            reserve=min(max_tokens or n_ctx, n_ctx // _RESERVE_SHARE),
            dropped=len(left_out) if turns_of(messages)[: len(left_out)] == left_out else 0,
        )
        return fitted, known[len(fitted.messages)]

    def _with_system(self, messages: Sequence[Message], *, tells: bool) -> list[Message]:
        """``messages`` with the symbols of the system message expanded, and functions told of behind it."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        parts = [self._symbols.expand(text_of(messages[0]))] if has_system else []
        if tells and (functions := self._functions.describe()):
            parts.append(functions)
        system = [{"role": "system", "content": "\n\n".join(parts)}] if parts else []
        return [*system, *messages[has_system:]]

    def _rendered(self, messages: Sequence[Message]) -> str:
        """The prompt by the model's template; results of functions as it knows them, or as the user's words."""
        if any(images_of(message) for message in messages):
            raise UsageError("this class reads no images", hint="`python -m runtime chat` shows them to a model")
        texts = [{**message, "content": text_of(message)} for message in messages]
        results = any(message["role"] == "tool" for message in texts)
        if results and "tool" in (self._template.source or ""):
            try:
                return self._template.render(texts)
            except ArtifactError:
                pass  # it wants them in a form of its own
        return self._template.render(_as_users_words(texts) if results else texts)


@dataclass(kw_only=True)
class _Said:
    """One round: ``raw`` came from the model, ``text`` was handed out; ``call`` ended it, ``left`` the consumer.

    Calls are looked for behind ``settled``.
    """

    finds: bool
    raw: str = ""
    settled: int = 0
    text: str = ""
    call: Call | None = None
    left: bool = False


class _NothingCameError(Exception):
    """A reply that was ended before its first word: the conversation is as it was."""


def _as_users_words(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with the results of functions told by the user, in one message with what he says beside them.

    Many templates refuse two messages of the user in a row.
    """
    told: list[dict[str, Any]] = []
    for message in messages:
        said = message
        if message["role"] == "tool":
            text = f"{message.get('name', 'the function')} returned: {message['content']}"
            said = {"role": "user", "content": text}
        if told and told[-1]["role"] == said["role"] == "user":
            said = {"role": "user", "content": f"{told.pop()['content']}\n\n{said['content']}"}
        told.append(said)
    return told


def _carried_out(call: Call, result: Result) -> FunctionCall:
    return FunctionCall(name=call.name, text=call.text, result=result.text, failed=not result.ok)
