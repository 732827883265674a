"""One error root, one subclass per exit code; each says what failed, shows evidence, names a next step.

Exit codes: 0 done; 1 a bug (traceback); the rest are the classes below. A child command's own status
goes into the message, never through as ours.
"""

from __future__ import annotations

from typing import ClassVar


class FoundryError(Exception):
    """A failure the user can act on.

    ``message`` says what failed, ``evidence`` holds the lines that prove it (may be empty) and
    ``hint`` is the next thing to do or type.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, evidence: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.evidence = evidence
        self.hint = hint


class UsageError(FoundryError):
    """A wrong option, recipe or argument."""

    exit_code = 2


class MissingError(FoundryError):
    """Something is missing on the machine: a tool, a driver, disk space."""

    exit_code = 3


class FetchError(FoundryError):
    """A download, clone or hub access failed, or what came has the wrong hash."""

    exit_code = 4


class CommandError(FoundryError):
    """A child command failed."""

    exit_code = 5


class ArtifactError(FoundryError):
    """A file failed its check."""

    exit_code = 6


class MemoryFitError(FoundryError):
    """It does not fit in memory."""

    exit_code = 7


INTERRUPTED_EXIT_CODE = 130
