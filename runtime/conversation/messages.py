"""One message, in the form that OpenAI's chat API has and chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

Message: TypeAlias = Mapping[str, Any]
"""``role`` and ``content``, which is a text or a list of parts: ``{"type": "text", "text": ...}`` and
``{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}``. A message that only calls tools has
None."""

ROLES: Final[tuple[str, ...]] = get_args(Role)
KEYS: Final = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
PART_KEYS: Final[Mapping[str, tuple[str, ...]]] = {"text": ("type", "text"), "image_url": ("type", "image_url")}
MAX_DEPTH: Final = 32
MAX_KEY_CHARS: Final = 128
"""YAML wants a key within 1024 characters, and an escape has up to ten."""
MAX_INT_BITS: Final = 1024


class Misshapen(ValueError):
    """A message that is none: what is wrong, where in it, and what there could have been instead."""

    def __init__(self, wrong: str, *path: str | int, word: str = "", known: Sequence[str] = ()) -> None:
        super().__init__(wrong)
        self.wrong, self.path, self.word, self.known = wrong, path, word, known


def text_of(message: Message) -> str:
    """The text of a message, its other parts left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part.get("type") == "text")


def images_of(message: Message) -> list[str]:
    """The URLs of a message's images, in their order."""
    content = message["content"]
    if isinstance(content, str):
        return []
    return [part["image_url"]["url"] for part in content or () if part.get("type") == "image_url"]


def turns_of(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages in turns, without the system messages at the head.

    A turn begins at a user message; what stands before the first one is a turn of its own.
    """
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "system" and not turns:
            continue
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def copied(message: Message) -> dict[str, Any]:
    """A message that shares nothing that can change with the one given."""
    return {key: _copied(value) for key, value in message.items()}


def checked(message: object) -> dict[str, Any]:
    """A copy of ``message`` in plain dicts and lists; Misshapen says what makes it no message."""
    if not isinstance(message, Mapping):
        raise Misshapen(f"is {_kind(message)}, not a message of role and content")
    for key in message:
        if key not in KEYS:
            raise Misshapen(f"has an unknown key {key!r}", key, word=str(key), known=KEYS)
    if "role" not in message:
        raise Misshapen("has no role")
    role = message["role"]
    if role not in ROLES:
        raise Misshapen(f"has the role {role!r}; roles are {', '.join(ROLES)}", "role", word=str(role), known=ROLES)
    if "content" not in message:
        raise Misshapen("has no content")
    result = {key: _plain(value, (key,)) for key, value in message.items()}
    _check_content(result)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in result and not isinstance(result[key], str):
            raise Misshapen(f"has a {key} that is {_kind(result[key])}, not a text", key)
    if "tool_calls" in result:
        _check_tool_calls(result["tool_calls"])
    return result


def _check_content(message: Mapping[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if not isinstance(content, list):
        raise Misshapen(f"has a content that is {_kind(content)}, not a text", "content")
    for index, part in enumerate(content):
        _check_part(part, index)


def _check_part(part: object, index: int) -> None:
    where = ("content", index)
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise Misshapen(f"has a part that is {_kind(part)} without a type", *where)
    kind: str = part["type"]
    if kind not in PART_KEYS:
        kinds = tuple(PART_KEYS)
        raise Misshapen(
            f"has a part of type {kind!r}; types are {', '.join(kinds)}", *where, word=str(kind), known=kinds
        )
    for key in part:
        if key not in PART_KEYS[kind]:
            raise Misshapen(f"has a part with an unknown key {key!r}", *where, key, word=key, known=PART_KEYS[kind])
    match part:
        case {"type": "text", "text": str()}:
            return
        case {"type": "image_url", "image_url": {"url": str(), **rest}}:
            if extra := [key for key in rest if key != "detail"]:
                known = ("url", "detail")
                raise Misshapen(
                    f"has an image with an unknown key {extra[0]!r}",
                    *where,
                    "image_url",
                    word=str(extra[0]),
                    known=known,
                )
            return
    form = 'text: "..."' if kind == "text" else 'image_url: {url: "..."}'
    raise Misshapen(f"has a part of type {kind} without {form}", *where)


def _check_tool_calls(calls: object) -> None:
    if not isinstance(calls, list):
        raise Misshapen(f"has tool_calls that are {_kind(calls)}, not a list", "tool_calls")
    for index, call in enumerate(calls):
        match call:
            case {"function": {"name": str()}}:
                pass
            case _:
                raise Misshapen("has a tool call without function: {name: ...}", "tool_calls", index)


def _plain(value: object, path: tuple[str | int, ...]) -> Any:
    """A copy of a JSON-like value in plain dicts and lists."""
    if len(path) > MAX_DEPTH:
        raise Misshapen(f"is nested deeper than {MAX_DEPTH}", *path[:2])
    match value:
        case None | bool() | float():
            return value
        case str():
            return str(value)
        case int() if value.bit_length() <= MAX_INT_BITS:
            return int(value)
        case Mapping():
            for key in value:
                if not isinstance(key, str) or len(key) > MAX_KEY_CHARS:
                    raise Misshapen(f"has a key that is no text of at most {MAX_KEY_CHARS} characters", *path)
            return {str(key): _plain(inner, (*path, key)) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner, (*path, index)) for index, inner in enumerate(value)]
    raise Misshapen(f"holds {_kind(value)}", *path)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(inner) for inner in value]
    return value


def _kind(value: object) -> str:
    """What a value is, in the words of YAML."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else f"the truth value {str(value).lower()}"
    kinds = ((int | float, "number"), (str, "text"), (Mapping, "mapping"), (list | tuple, "list"))
    return f"a {next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)}"
