"""The conversation that a LLaMa keeps, and what its texts may stand for: symbols and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from runtime.conversation.functions import AnyFunction, Functions
from runtime.conversation.messages import Message, Role
from runtime.conversation.symbols import Symbols
from runtime.conversation.tracker import Conversation
from runtime.llama.gate import Gate


class Tracked:
    """A conversation that goes on from reply to reply.

    While a reply is running it cannot be changed: the methods here then raise UsageError.
    """

    def __init__(self, system_message: str = "") -> None:
        self._gate = Gate()
        self._conversation = Conversation()
        self._symbols = Symbols()
        self._functions = Functions()
        self._left_out: list[list[Message]] = []  # the oldest turns, which had no room in the last prompt
        if system_message:
            self._conversation.system = system_message

    @property
    def conversation(self) -> Conversation:
        """The conversation itself; what is changed here counts from the next reply on."""
        return self._conversation

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of its messages, ``{"role": ..., "content": ...}`` each, the system message first if there is one."""
        return self._conversation.messages

    @property
    def system_message(self) -> str:
        """The text of the system message, as it was given; empty: none. May be set at any time between replies."""
        return self._conversation.system

    @system_message.setter
    def system_message(self, text: str) -> None:
        with self._gate.held("system_message"):
            self._conversation.system = text

    def add_message(self, role: Role, content: str) -> None:
        """Append a message of ``"user"``, ``"assistant"`` or ``"tool"``, symbols in a user's expanded; nothing replies.

        ``create_completion()`` without a prompt then answers. A ``"system"`` message can only be the first: set
        ``system_message``. UsageError for anything else.
        """
        with self._gate.held("add_message"):
            self._add(self._conversation, [{"role": role, "content": content}])

    def pop_message(self) -> Message:
        """Take the last message away and return it; UsageError when there is none but the system message."""
        with self._gate.held("pop_message"):
            return self._conversation.pop()

    def reset(self) -> None:
        """Forget the conversation; the system message, symbols and functions stay."""
        with self._gate.held("reset"):
            self._conversation.reset()

    def adopt(self, other: Tracked | Conversation) -> None:
        """Go on with a copy of the conversation of another LLaMa, or of a Conversation, system message included."""
        with self._gate.held("adopt"):
            self._conversation.adopt(other.conversation if isinstance(other, Tracked) else other)

    def invert_roles(self) -> None:
        """What the user said becomes the assistant's, and the other way round."""
        with self._gate.held("invert_roles"):
            self._conversation.invert_roles()

    def save_conversation(self, path: str | Path) -> None:
        """Write the conversation to ``path`` as YAML, in one atomic step. MissingError when the disk takes no more."""
        self._conversation.save(path)

    def load_conversation(self, path: str | Path) -> None:
        """Go on with the conversation in the YAML file at ``path``, whichever model it was with.

        Raises UsageError, with file and line, for what is none; the conversation then stays as it was.
        """
        self.adopt(Conversation.load(path))

    def register_symbol(self, name: str, value: object) -> None:
        """Let ``[[name]]`` stand for ``value``, or, of a function, for what it returns; also ``[[name(1, "a")]]``.

        Expanded in the texts of the user, once, when they are added, and in the system message each time a prompt is
        built. Arguments are Python literals. An unknown symbol stays visible as ``[[name: missing]]``, a function that
        raises as ``[[name: what it said]]``. Raises UsageError for a name that is not letters, digits and ``_``.
        """
        self._symbols.register(name, value)

    def register_function(
        self, function: AnyFunction, name: str | None = None, description: str | None = None
    ) -> AnyFunction:
        """Let the model call ``function``, under its own name and with its docstring's text unless others are given.

        Returns ``function``, so that it decorates one. The system message then tells of it. A call in a reply
        (``name(literals)``, outside code, parsed by ``ast``, never evaluated) is carried out, and its result, or the
        error's text, goes back to the model. Raises UsageError for what is no function, or has no usable name or
        signature.
        """
        return self._functions.register(function, name, description)

    def register_functions(self, *functions: Callable[..., object]) -> None:
        """``register_function`` of each, by their own names and docstrings."""
        for function in functions:
            self._functions.register(function)

    def _add(self, conversation: Conversation, messages: Iterable[Message]) -> None:
        """Add ``messages``, the symbols in the user's replaced."""
        for message in Conversation(messages).messages:
            content = message["content"]
            if message["role"] == "user" and content:
                message["content"] = self._expanded(content)
            conversation.add(**message)

    def _expanded(self, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return self._symbols.expand(content)
        return [
            {**part, "text": self._symbols.expand(part["text"])} if part["type"] == "text" else part for part in content
        ]
