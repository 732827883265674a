"""What the pipeline asks of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from toolchain.base.command import OnProgress


class Stage(ABC):
    """One kind of step with its parameters: what it depends on, how it runs, how its output is checked."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The line that the user sees."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """All that the output depends on beside the outputs of earlier steps; JSON values."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """How much the output will take on disk, about."""

    @property
    def ram_bytes(self) -> int:
        """How much memory the step will take, about."""
        return 1 << 30

    @abstractmethod
    def command(self, output: Path) -> tuple[str, ...]:
        """The command line that makes ``output``; of a step done in this process, what it amounts to."""

    @abstractmethod
    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        """Make ``output``, a path that nobody else knows yet. Raises a FoundryError."""

    def check(self, output: Path) -> Mapping[str, object]:
        """Raise ArtifactError unless ``output`` is sound; the figures that are worth keeping."""
        return {}

    def present(self, output: Path) -> bool:
        """Whether what an earlier run made is still there."""
        return output.exists()


def package_version(name: str) -> str:
    """The installed version of a package that an output depends on; "none" when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
