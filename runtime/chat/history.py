"""What was typed into the chat before: one JSON text a line, the newest last, readable by its owner alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prompt_toolkit.history import History

from toolchain.base import console, files
from toolchain.base.errors import FoundryError

ENTRIES: Final = 1000
ENTRY_BYTES: Final = 1 << 16
"""A longer one is a text that was pasted, and is not kept."""
FILE_BYTES: Final = 1 << 20
"""Above this, and above twice ``ENTRIES``, the file is written anew with the newest half of it."""

_LIBEDIT: Final = "_HiStOrY_V2_"


class KeptHistory(History):
    """The history at ``path``. A line that is no JSON text is one of the readline library's, which wrote it before.

    A place that cannot be written is told once; what is typed is then remembered until the chat ends.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._told = False

    def load_history_strings(self) -> Iterable[str]:
        """What is remembered, the newest first."""
        try:
            raw = self._path.read_bytes()
        except OSError:
            return []  # the first time, or a place that we may not read
        entries = _entries(raw.decode("utf-8", "replace"))
        if len(entries) > 2 * ENTRIES or len(raw) > FILE_BYTES:
            entries = _newest(entries, FILE_BYTES // 2)
            self._rewrite(entries)
        return entries[: -ENTRIES - 1 : -1]

    def store_string(self, string: str) -> None:
        line = _line(string)
        if len(line) > ENTRY_BYTES:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._tell(str(error))

    def _rewrite(self, entries: Iterable[str]) -> None:
        try:
            with files.staged(self._path) as partial:
                partial.write_bytes(b"".join(map(_line, entries)))
                partial.chmod(0o600)
        except (OSError, FoundryError) as error:
            self._tell(str(error))

    def _tell(self, reason: str) -> None:
        if not self._told:
            console.warn(f"what is typed is not remembered for the next chat: {reason}")
            self._told = True


def _entries(text: str) -> list[str]:
    lines = text.split("\n")
    if lines[0] == _LIBEDIT:
        lines = [re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line) for line in lines[1:]]
    return [_entry(line) for line in lines if line.strip()]


def _entry(line: str) -> str:
    if line.startswith('"'):
        try:
            return str(json.loads(line))
        except ValueError:
            pass
    return line


def _line(entry: str) -> bytes:
    return f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", "replace")


def _newest(entries: list[str], room_bytes: int) -> list[str]:
    kept: list[str] = []
    for entry in reversed(entries[-ENTRIES:]):
        room_bytes -= len(_line(entry))
        if room_bytes < 0:
            break
        kept.append(entry)
    return kept[::-1]
