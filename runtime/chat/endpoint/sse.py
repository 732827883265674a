"""Server-sent events out of bytes, however those are cut: the objects that they carry.

After the WHATWG's description of event streams, and more forgiving where servers are careless: events without a
blank line between them, an object without its ``data:``, an end without a line break.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

EVENT_BYTES: Final = 4 << 20
"""Of one event; a chunk of a reply has some hundred."""
IDLE_BYTES: Final = 1 << 20
"""Of comments and the like between two events; a heartbeat each second takes a day for it."""
DONE: Final = "[DONE]"

Event: TypeAlias = "Mapping[str, Any] | str"
"""An object, ``DONE``, or data that is neither, as it came."""

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_BOM: Final = b"\xef\xbb\xbf"


class FloodError(Exception):
    """More bytes than a reply can need, without an event among them."""


class EventReader:
    """Feed it bytes; what is unfinished is kept, and bounded. Raises FloodError."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._data: list[str] = []
        self._begun = False
        self._after_cr = False
        self._held = 0  # bytes since the last event

    def feed(self, data: bytes) -> Iterator[Event]:
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if not data:
            return
        self._after_cr = data.endswith(b"\r")
        *ended, rest = _LINE_END.split(data)
        for part in ended:
            self._hold(len(part) + 1)
            line = b"".join((*self._line, part))
            self._line.clear()
            yield from self._take(line)
        if rest:
            self._line.append(rest)
            self._hold(len(rest))

    def end(self) -> Iterator[Event]:
        """What the end of the stream completes."""
        line = b"".join(self._line)
        self._line.clear()
        yield from self._take(line)
        yield from self._dispatch()

    def _hold(self, count: int) -> None:
        self._held += count
        if self._held > (EVENT_BYTES if self._data or self._line else IDLE_BYTES):
            raise FloodError

    def _take(self, line: bytes) -> Iterator[Event]:
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        text = line.decode("utf-8", "replace")
        if not text:
            yield from self._dispatch()
            return
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if name == "data" or (name == "error" and value.startswith("{")):  # some servers say error: {...}
            yield from self._add(value if name == "data" else f'{{"error": {value}}}')
        elif text.startswith("{"):
            yield from self._add(text)
        elif name not in ("", "event", "id", "retry"):
            yield text

    def _add(self, value: str) -> Iterator[Event]:
        """One line of data; most events are a single one, which need not wait for the blank line."""
        found = DONE if value.strip() == DONE else read_object(value)
        if found is None or self._data:
            self._data.append(value)
            return
        self._held = 0
        yield found

    def _dispatch(self) -> Iterator[Event]:
        if self._data:
            text = "\n".join(self._data)
            self._data.clear()
            found = read_object(text)
            if found is not None:
                self._held = 0
            yield text if found is None else found


def read_object(text: str) -> Mapping[str, Any] | None:
    """The JSON object in ``text``; None when it is none, however it is not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
