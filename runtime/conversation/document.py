"""A conversation as YAML that people read and edit, exact to the character.

It is read from the parser's events, so that size, depth and number of entries are bounded before anything is built, and
no tag makes anything but texts, numbers, truth values, lists and mappings.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from runtime.conversation.messages import Message, Misshapen, checked
from runtime.conversation.yaml_text import as_yaml
from runtime.settings import near_miss
from toolchain.base import files
from toolchain.base.errors import UsageError

VERSION: Final = 1
MAX_BYTES: Final = 64 * 2**20
MAX_ENTRIES: Final = 1_000_000
MAX_DEPTH: Final = 40
MAX_SCALAR_CHARS: Final = 1000
"""What is longer is a text, whatever else it looks like: 1:1:1... is a number in base 60, and slow to read."""
KEYS: Final = ("version", "messages")
HINT: Final = "a conversation is `version: 1` and `messages:`, a list of `- role: user` with `content: ...`"

_LONE_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_TEXT_TAG: Final = "tag:yaml.org,2002:str"
_Path = tuple[str | int, ...]


def written(messages: Sequence[Message]) -> str:
    """The YAML of a conversation. Raises UsageError when it is too large to be read again."""
    text = as_yaml({"version": VERSION, "messages": list(messages)})
    if len(text) * 4 > MAX_BYTES and len(text.encode()) > MAX_BYTES:
        raise _too_large("the conversation", len(text.encode()))
    return text


def read(text: str, name: str = "the conversation") -> list[dict[str, Any]]:
    """The messages of a YAML document. Raises UsageError with the line of what is wrong; ``name`` says in what."""
    if len(text) * 4 > MAX_BYTES and (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_BYTES:
        raise _too_large(name, size)
    lines: dict[_Path, int] = {}
    try:
        content = _Reader(text, lines).document()
        return _messages(content)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{where}: {error.problem or error.context}", hint=HINT) from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise UsageError(f"{name} is no YAML", evidence=str(error), hint=HINT) from None
    except Misshapen as error:
        path = error.path
        while path not in lines and path:
            path = path[:-1]
        where = f", line {lines[path]}" if path in lines else ""
        hint = near_miss(error.word, error.known) or _quote_hint(error) or HINT
        raise UsageError(f"{name}{where}: {error.wrong}", hint=hint) from None


def save(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one atomic step; a link stays one, and a file keeps its mode."""
    try:
        if path.exists() and not path.is_file():
            what, example = ("a directory", path / "talk.yaml") if path.is_dir() else ("no file", "talk.yaml")
            raise UsageError(f"{path} is {what}", hint=f"name a file, such as {example}")
        with files.disk_errors(path):
            _write(path, text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written", evidence=str(error)) from error


def load(path: Path) -> list[dict[str, Any]]:
    """The messages in the file ``path``. Raises UsageError when there is none, or it holds something else."""
    try:
        with path.open("rb") as source:
            raw = source.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _too_large(str(path), path.stat().st_size)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8", evidence=str(error), hint=HINT) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read", evidence=str(error)) from error
    return read(text, str(path))


def _write(path: Path, text: str) -> None:
    path = Path(os.path.realpath(path))
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=files.PARTIAL, suffix=".yaml", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            sink.write(text.encode())
        partial.chmod(mode)
        files.promote(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _Reader:
    """Values from YAML events; ``lines`` learns where the values near the root stand."""

    def __init__(self, text: str, lines: dict[_Path, int]) -> None:
        fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        loader = yaml.SafeLoader if _LONE_SURROGATE.search(text) else fast  # the fast one refuses them
        self._loader = loader(text)
        self._events: Iterator[Any] = self._bounded()
        self._lines = lines

    def document(self) -> Any:
        next(self._events)  # the stream's start
        first = next(self._events)
        if isinstance(first, yaml.StreamEndEvent):
            raise Misshapen("is empty")
        content = self._build(next(self._events), ())
        next(self._events)  # the document's end
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            raise Misshapen("holds a second document")
        return content

    def _bounded(self) -> Iterator[Any]:
        depth = entries = 0
        while self._loader.check_event():
            event = self._loader.get_event()
            entries += 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if entries > MAX_ENTRIES:
                raise _at(event, f"more than {MAX_ENTRIES} entries")
            if depth > MAX_DEPTH:
                raise _at(event, f"nested deeper than {MAX_DEPTH}")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _at(event, "anchors and aliases have no place in a conversation; quote what begins with & or *")
            yield event

    def _build(self, event: Any, path: _Path) -> Any:
        if len(path) < 6:
            self._lines[path] = event.start_mark.line + 1
        match event:
            case yaml.ScalarEvent():
                return self._construct(event)
            case yaml.SequenceStartEvent():
                items: list[Any] = []
                while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                    items.append(self._build(inner, (*path, len(items))))
                return items
        mapping: dict[Any, Any] = {}
        while not isinstance(inner := next(self._events), yaml.MappingEndEvent):
            key = self._construct(inner) if isinstance(inner, yaml.ScalarEvent) else None
            if not isinstance(key, str):
                raise _at(inner, "a key that is no text; quote it")
            if key in mapping:
                raise _at(inner, f"the key {key!r} stands there twice")
            mapping[key] = self._build(next(self._events), (*path, key))
            if len(path) < 5:
                self._lines[(*path, key)] = inner.start_mark.line + 1
        return mapping

    def _construct(self, event: Any) -> Any:
        tag = event.tag
        if tag is None or tag == "!":
            tag = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag == _TEXT_TAG or len(event.value) > MAX_SCALAR_CHARS:
            return event.value
        node = yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark)
        try:
            return self._loader.construct_object(node)
        except (ValueError, OverflowError):  # a date that is none, a number of too many digits
            return event.value if event.tag is None else _refuse(event)


def _refuse(event: Any) -> Any:
    raise _at(event, f"the value is not what its tag {event.tag} says")


def _at(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _messages(content: object) -> list[dict[str, Any]]:
    if not isinstance(content, dict):
        raise Misshapen("is no mapping of version and messages")
    for key in content:
        if key not in KEYS:
            raise Misshapen(f"there is an unknown key {key!r}", key, word=key, known=KEYS)
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        found = f"the version is {version!r}" if "version" in content else "there is no version"
        raise Misshapen(f"{found}; {VERSION} is the one known here", "version")
    items = content.get("messages")
    if not isinstance(items, list):
        raise Misshapen("messages is no list" if "messages" in content else "there are no messages", "messages")
    return [_message(item, index) for index, item in enumerate(items)]


def _message(item: object, index: int) -> dict[str, Any]:
    try:
        message = checked(item)
        if message["role"] == "system" and index:
            raise Misshapen("is a system message; it can only be the first", "role")
    except Misshapen as error:
        wrong, path = f"message {index + 1} {error.wrong}", ("messages", index, *error.path)
        raise Misshapen(wrong, *path, word=error.word, known=error.known) from None
    return message


def _quote_hint(error: Misshapen) -> str:
    quotable = ("not a text", "holds a date", "holds a datetime", "holds a bytes")
    return (
        'texts that look like something else are quoted: "yes", "1.0", "2024-01-31"'
        if error.wrong.endswith(quotable)
        else ""
    )


def _too_large(name: str, size: int) -> UsageError:
    return UsageError(
        f"{name} is too large",
        evidence=f"{size / 2**20:.0f} MiB as YAML; at most {MAX_BYTES // 2**20} MiB are read",
        hint="large images make it so; take out what is not needed",
    )
