"""Where a repository's files lie on this disk, in the hub library's own cache layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import files
from toolchain.hub.repository import RemoteFile

_LIBRARY_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True)
class Place:
    """One commit's place in the cache: ``models--owner--name/{blobs,snapshots/<commit>,verified}``."""

    cache: Path
    store: Path
    folder: Path
    note: Path

    @classmethod
    def of(cls, repo: str, commit: str, cache_dir: Path) -> Place:
        cache = cache_dir.expanduser().resolve()
        store = cache / f"models--{repo.replace('/', '--')}"
        return cls(cache, store, store / "snapshots" / commit, store / "verified" / f"{commit}.json")

    @property
    def lock(self) -> Path:
        """Held by the one process that downloads from the repository."""
        return self.cache / ".locks" / f"{self.store.name}.lock"

    def holds(self, file: RemoteFile) -> bool:
        path = self.folder / file.name
        return path.is_file() and path.stat().st_size == file.bytes

    def holds_verified(self, wanted: Iterable[RemoteFile]) -> bool:
        """Whether all of them are there, were verified, and still have their sizes."""
        verified = self.verified()
        return all(verified.get(file.name) == identity(file) and self.holds(file) for file in wanted)

    def partial(self, file: RemoteFile) -> Path:
        return self.store / "blobs" / f"{file.sha256}.incomplete"

    def missing_bytes(self, wanted: Iterable[RemoteFile]) -> int:
        missing = [file for file in wanted if not self.holds(file)]
        partials = [self.partial(file) for file in missing if file.sha256]
        started = sum(path.stat().st_size for path in partials if path.is_file())
        return sum(file.bytes for file in missing) - started

    def leftovers(self) -> list[Path]:
        """What the library was writing when it was killed; it never returns to these."""
        found = (self.store / "blobs").glob("*.incomplete")
        return [path for path in found if _LIBRARY_LEFTOVER.fullmatch(path.name)]

    def verified(self) -> dict[str, object]:
        """By file name, the identity that was found right."""
        known = files.read_json(self.note)
        return known if isinstance(known, dict) else {}

    def discard(self, path: Path) -> None:
        """Delete a cached file: its link in the snapshot and whatever blob that leads to."""
        while path.is_symlink():
            target = Path(os.path.normpath(path.parent / path.readlink()))
            files.remove(path, within=self.cache)
            path = target
        if path.exists():
            files.remove(path, within=self.cache)


def identity(file: RemoteFile) -> list[object]:
    """What is noted of a verified file."""
    return [file.bytes, file.sha256]
