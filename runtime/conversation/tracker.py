"""The conversation so far, kept apart from whoever answers it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.conversation import document
from runtime.conversation.messages import Message, Misshapen, Role, checked, copied, text_of, turns_of
from runtime.settings import near_miss
from toolchain.base.errors import UsageError

_INVERSE = {"user": "assistant", "assistant": "user"}


class Conversation:
    """Messages in their order, at most one system message at the head of them.

    What comes in and what goes out is copied: a message that someone else holds never changes this one. Errors
    are UsageError.
    """

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self._messages: list[dict[str, Any]] = []
        for message in messages:
            self._append(message)

    def __len__(self) -> int:
        """Messages, the system message among them."""
        return len(self._messages)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conversation) and self._messages == other._messages

    __hash__ = None  # type: ignore[assignment]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of all messages, the system message first if there is one."""
        return [copied(message) for message in self._messages]

    @property
    def system(self) -> str:
        """The text of the system message, empty where there is none. Setting it to an empty text takes it away."""
        return text_of(self._messages[0]) if self._has_system() else ""

    @system.setter
    def system(self, text: str) -> None:
        first = [_message({"role": "system", "content": text})] if text else []
        self._messages = first + self._said()

    def add(self, role: Role, content: Any, **more: Any) -> None:
        """Append a message. ``content`` is a text or a list of parts; ``more`` are a message's other keys: name,
        tool_calls, tool_call_id, reasoning_content. A system message can only be the first.
        """
        self._append({"role": role, "content": content, **more})

    def pop(self) -> Message:
        """Take the last message away; the system message is not one of them."""
        if not self._said():
            raise UsageError("the conversation has no message to take away")
        return copied(self._messages.pop())

    def reset(self) -> None:
        """Forget all but the system message."""
        self._messages = self._messages[: len(self._messages) - len(self._said())]

    def adopt(self, other: Conversation) -> None:
        """Become a copy of ``other``, system message included."""
        self._messages = other.messages

    def invert_roles(self) -> None:
        """The user's messages become the assistant's and the other way round; the others stay."""
        self._messages = [
            {**message, "role": _INVERSE.get(message["role"], message["role"])} for message in self._messages
        ]

    def turns(self) -> list[list[Message]]:
        """Copies of the messages without the system message, in turns. A turn begins at a user message; what
        stands before the first one is a turn of its own.
        """
        return turns_of(self.messages)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """When the body raises, whatever it is, the conversation is as it was before. Transactions nest."""
        before = self._messages
        self._messages = list(before)
        try:
            yield
        except BaseException:
            self._messages = before
            raise

    def to_yaml(self) -> str:
        """The conversation as a YAML document that ``from_yaml`` reads back to the character."""
        return document.written(self._messages)

    @classmethod
    def from_yaml(cls, text: str) -> Conversation:
        """Read what ``to_yaml`` wrote, or a person; the error names the line."""
        return cls(document.read(text))

    def save(self, path: str | Path) -> None:
        """Write the conversation to ``path`` in one atomic step. MissingError when the disk does not take it."""
        document.save(Path(path), self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Conversation:
        """Read a saved conversation; the error names the file and the line."""
        return cls(document.load(Path(path)))

    def _has_system(self) -> bool:
        return bool(self._messages) and self._messages[0]["role"] == "system"

    def _said(self) -> list[dict[str, Any]]:
        return self._messages[1:] if self._has_system() else self._messages

    def _append(self, message: Message) -> None:
        new = _message(message)
        if new["role"] == "system" and self._messages:
            raise UsageError("a system message stands first, and there is one at most", hint="set .system")
        self._messages.append(new)


def _message(message: object) -> dict[str, Any]:
    try:
        return checked(message)
    except Misshapen as error:
        raise UsageError(f"the message {error.wrong}", hint=near_miss(error.word, error.known)) from None
