"""Files of examples, read without trusting them: line by line, in bounded memory, every problem with its line.

``text``      plain UTF-8, one long document
``chat``      JSONL: {"messages": [{"role", "content"}]}, or ShareGPT's {"conversations": [{"from", "value"}]}
``instruct``  JSONL: {"instruction", "input"?, "output"}, {"prompt", "completion"} or {"question", "answer"}
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, TypeAlias

from toolchain.base.errors import UsageError
from toolchain.lora.data.problems import Problems, shown

if TYPE_CHECKING:
    from toolchain.base.chat_template import Message

Kind: TypeAlias = Literal["text", "chat", "instruct"]

MAX_LINE_BYTES: Final = 4 << 20
"""One example; about a million tokens, more than any context."""
MAX_RUN: Final = 128 << 10
"""Characters in a row without white space, or of nothing else: more is no text, and some tokenizers do not bear it."""
ROLES: Final = ("system", "user", "assistant", "tool")
_OTHER_NAMES: Final[Mapping[str, str]] = {
    **{"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
    **{"model": "assistant", "developer": "system", "function": "tool", "observation": "tool"},
}
_SHAREGPT: Final[Mapping[str, str]] = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant"}
_PAIRS: Final = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))
_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """``path`` is absolute; the file counts ``repeat`` times in an epoch."""

    path: str
    kind: Kind
    repeat: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns in order, at least one of them the assistant's, from ``line`` of a file."""

    messages: tuple[Message, ...]
    line: int


def require_files(files: Iterable[DataFile]) -> None:
    """UsageError for the first of ``files`` that is not there or is no file; what is in them is not looked at."""
    for file in files:
        _open(Path(file.path)).close()


def check_files(files: Iterable[DataFile]) -> None:
    """UsageError for everything that is wrong with ``files``, up to a number; they are read to the end."""
    problems = Problems()
    for file in files:
        if file.kind == "text":
            _check_text(Path(file.path), problems)
        else:
            for _ in conversations(file, problems):
                pass
    problems.settle()


def conversations(file: DataFile, problems: Problems) -> Iterator[Conversation]:
    """The examples of a chat or instruct file, in order; what is wrong with a line goes to ``problems``.

    UsageError when the file is not there, or holds nothing.
    """
    path = Path(file.path)
    parse = _chat if file.kind == "chat" else _instruct
    lines, found_before = 0, len(problems)
    for number, line in _lines(path, problems):
        lines += 1
        try:
            yield Conversation(messages=parse(_object(line)), line=number)
        except _Wrong as wrong:
            problems.add(path, number, str(wrong))
    if not lines and len(problems) == found_before:
        raise _nothing_in(path)


def read_text(file: DataFile) -> bytes:
    """The bytes of a checked text file, without a byte order mark."""
    return Path(file.path).read_bytes().removeprefix(codecs.BOM_UTF8)


class _Wrong(Exception):
    """One line's problem, on its way to the others."""


def _chat(value: dict[str, Any]) -> tuple[Message, ...]:
    name, roles, keys = "messages", {role: role for role in ROLES}, ("role", "content")
    if "messages" not in value and "conversations" in value:
        name, roles, keys = "conversations", dict(_SHAREGPT), ("from", "value")
    turns = value.get(name)
    if not isinstance(turns, list) or not turns:
        raise _Wrong(_no_messages(value) if turns is None else f"{name} is {shown(turns)}, not a list of turns")
    messages = tuple(_turn(turn, f"{name}[{i}]", roles, *keys) for i, turn in enumerate(turns))
    said = [message["role"] for message in messages]
    if "assistant" not in said:
        only = "only system turns" if set(said) == {"system"} else f"turns of {', '.join(dict.fromkeys(said))}"
        raise _Wrong(f"there is no turn of the assistant to learn, {only}")
    return messages


def _turn(turn: object, where: str, roles: Mapping[str, str], role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise _Wrong(f"{where} is {shown(turn)}, not an object with {role_key} and {content_key}")
    if role_key not in turn:
        raise _Wrong(f"{where} has no {role_key}; its keys are {_keys(turn)}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        near = _OTHER_NAMES.get(str(role).lower()) or next(iter(difflib.get_close_matches(str(role), roles, n=1)), "")
        raise _Wrong(f"{where}: unknown role {shown(role)}; " + (f"did you mean {near}?" if near else _known(roles)))
    content = _text(turn, content_key, where)
    if roles[role] == "assistant" and not content.strip():
        raise _Wrong(f"{where}: the assistant says nothing")
    return {"role": roles[role], "content": content}


def _instruct(value: dict[str, Any]) -> tuple[Message, ...]:
    pair = next((pair for pair in _PAIRS if all(key in value for key in pair)), None)
    if pair is None:
        if "messages" in value or "conversations" in value:
            raise _Wrong("this is a conversation; name the file under `chat:` in the recipe")
        half = next((other for pair in _PAIRS for key, other in (pair, pair[::-1]) if key in value), "")
        forms = ", ".join(" and ".join(pair) for pair in _PAIRS)
        missing = f"it has no {half}" if half else f"it has none of {forms}"
        raise _Wrong(f"{missing}; its keys are {_keys(value)}")
    asked, answered = (_text(value, key, "the example") for key in pair)
    if "input" in value and pair[0] == "instruction" and (more := _text(value, "input", "the example")).strip():
        asked = f"{asked}\n\n{more}"
    for name, said in zip(pair, (asked, answered), strict=True):
        if not said.strip():
            raise _Wrong(f"{name} is empty")
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answered}


def _text(value: Mapping[str, object], key: str, where: str) -> str:
    content = value.get(key)
    if not isinstance(content, str):
        found = f"is {shown(content)}, not text" if key in value else "is missing"
        raise _Wrong(f"{where}: {key} {found}")
    if "\0" in content:
        raise _Wrong(f"{where}: {key} has a NUL character")
    if len(content) > MAX_RUN and (run := max(map(len, re.findall(r"\S+|\s+", content)))) > MAX_RUN:
        raise _Wrong(f"{where}: {key} has a run of {run} characters without a break; {MAX_RUN} are the most")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise _Wrong(f"{where}: {key} has half a character (\\u{ord(content[error.start]):04x})") from None
    return content


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise _Wrong(_not_utf8(line, error.start)) from None
    except json.JSONDecodeError as error:
        rest = shown(error.doc[error.pos :].strip()) or "the line ends there"
        raise _Wrong(f"broken JSON: {error.msg} at character {error.pos + 1}: {rest}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise _Wrong(f"broken JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise _Wrong(f"not an object but {shown(value)}")
    return value


def _no_messages(value: dict[str, Any]) -> str:
    if any(all(key in value for key in pair) for pair in _PAIRS):
        return "this is an instruction with its answer; name the file under `instruct:` in the recipe"
    near = difflib.get_close_matches("messages", [key for key in value if isinstance(key, str)], n=1)
    return f"it has no messages; its keys are {_keys(value)}" + (
        f"; write messages for {shown(near[0])}" if near else ""
    )


def _keys(value: Mapping[Any, Any]) -> str:
    return shown(", ".join(map(str, value))) or "none"


def _known(roles: Iterable[str]) -> str:
    return f"known: {', '.join(roles)}"


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of the lines that are not blank; too long or no text, they are a problem."""
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                _refuse_utf16(path, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                size = len(line) + _rest_of_line(file)
                most = f"{MAX_LINE_BYTES} are the most for one example"
                problems.add(path, number, f"a line of {size} bytes; {most} (is it JSONL, an object a line?)")
            elif b"\0" in line:
                problems.add(path, number, f"a NUL byte at byte {line.index(0) + 1}: this is not a text file")
            elif line.strip():
                yield number, line


def _rest_of_line(file: BinaryIO) -> int:
    size = 0
    while part := file.readline(_BLOCK_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _check_text(path: Path, problems: Problems) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, blank, first = 1, True, True
    with _open(path) as file:
        while block := file.read(_BLOCK_BYTES):
            if first:
                _refuse_utf16(path, block)
                block, first = block.removeprefix(codecs.BOM_UTF8), False
            if (at := block.find(0)) >= 0:
                problems.add(path, line + block.count(b"\n", 0, at), "a NUL byte: this is not a text file")
                return
            waiting = decoder.getstate()[0]
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                whole = waiting + block
                problems.add(path, line + whole.count(b"\n", 0, error.start), _not_utf8(whole, error.start))
                return
            line += block.count(b"\n")
            blank = blank and not block.strip()
    if decoder.getstate()[0]:
        problems.add(path, line, "the file ends inside a character: it was cut")
    elif blank:
        raise _nothing_in(path)


def _not_utf8(data: bytes, at: int) -> str:
    before = data[:at].rsplit(b"\n", 1)[-1]
    return (
        f"not UTF-8: byte 0x{data[at]:02x} at byte {len(before) + 1} of the line, behind "
        f"{shown(before[-20:].decode('utf-8', 'replace')) or 'nothing'} (iconv -f latin1 -t utf-8 converts such files)"
    )


def _refuse_utf16(path: Path, beginning: bytes) -> None:
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        hint = f"convert it: iconv -f utf-16 -t utf-8 {path.name}"
        raise UsageError(f"{path} is UTF-16, not UTF-8", evidence=f"it begins with {beginning[:2].hex()}", hint=hint)


def _nothing_in(path: Path) -> UsageError:
    size = path.stat().st_size
    found = f"{size} bytes, all of them blank" if size else "0 bytes"
    return UsageError(
        f"{path} holds nothing to learn", evidence=found, hint="name a file with examples in data.sources"
    )


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode  # before opening: opening a FIFO would wait for its writer
        if stat.S_ISREG(mode):
            return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=_near_files(path)) from error
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a folder", hint=_near_files(path / "data.jsonl"))
    raise UsageError(f"{path} is not a regular file", hint="name a file in data.sources")


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; paths are relative to the recipe"
    names = sorted(each.name for each in path.parent.iterdir() if each.is_file())
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"did you mean {path.parent / near[0]}?"
    likely = [name for name in names if name.endswith((".jsonl", ".json", ".txt", ".md"))][:5]
    return f"in {path.parent} there are: {', '.join(likely)}" if likely else "paths are relative to the recipe"
