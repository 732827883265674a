"""What is wrong with files of examples: told together, each with its file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toolchain.base.errors import UsageError
from toolchain.base.harmless import harmless

MOST: Final = 10
"""Problems told at once; a file that has more is read no further."""
_SHOWN_CHARS: Final = 60


class Problems:
    """Collects; raises UsageError with what was found when there is enough of it, or at ``settle``."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, path: Path, line: int, what: str) -> None:
        self._found.append(f"{path.name}:{line}: {what}")
        if len(self._found) == MOST:
            self._found.append("(read no further)")
            self.settle()

    def settle(self) -> None:
        if self._found:
            raise UsageError(
                "the data cannot be learned as it is",
                evidence="\n".join(self._found),
                hint="mend or remove these lines; docs/lora.md shows the forms",
            )


def shown(value: object, most: int = _SHOWN_CHARS) -> str:
    """A stranger's value on one line, of ``most`` characters and then how many they are."""
    text = value if isinstance(value, str) else repr(value)
    short = text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
    return harmless(short).replace("\n", "\u2424").replace("\t", " ")
