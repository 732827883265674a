"""A child's failure, told to the process that started it: the same class, message, evidence and hint on both sides."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from toolchain.base import errors, files
from toolchain.base.errors import FoundryError, MissingError

FAILURE: Final = "failure.json"
"""Beside what the child was to write."""

_CLASSES: Final[dict[int, type[FoundryError]]] = {
    kind.exit_code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FoundryError)
}


def write_failure(folder: Path, error: FoundryError) -> int:
    """Leave ``error`` in ``folder`` for ``raise_failure``, and in the log; returns the status to exit with.

    On a full disk the log alone has it.
    """
    told = {"exit_code": error.exit_code, "message": error.message, "evidence": error.evidence, "hint": error.hint}
    sys.stderr.write(f"{error.message}\n{error.evidence}\n")
    with suppress(MissingError):
        files.write_json(folder / FAILURE, told)
    return error.exit_code


def raise_failure(folder: Path, fallback: FoundryError) -> NoReturn:
    """Raise what the child left in ``folder``; ``fallback``, what its exit status told, where it left nothing.

    The note is taken away, so that a second run in the same folder does not find it.
    """
    told = files.read_json(folder / FAILURE)
    (folder / FAILURE).unlink(missing_ok=True)
    match told:
        case {"exit_code": int(code), "message": str(message), "evidence": str(evidence), "hint": str(hint)}:
            raise _CLASSES.get(code, FoundryError)(message, evidence=evidence, hint=hint) from fallback
    raise fallback
