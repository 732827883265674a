"""A repository on the Hugging Face hub -> a checked snapshot of it on disk, pinned to one commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolchain.hub.conversion_files import choose_files
from toolchain.hub.download import download
from toolchain.hub.errors import not_convertible
from toolchain.hub.place import Place
from toolchain.hub.repository import RemoteFile, look_up


@dataclass(frozen=True, kw_only=True)
class HubSnapshot:
    """The wanted files of ``repo`` at ``commit``, which ``revision`` named when asked."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    n_params: int | None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def resolve_snapshot(repo: str, revision: str) -> HubSnapshot:
    """Ask the hub, in one call, which commit ``revision`` is and what of it conversion needs."""
    found = look_up(repo, revision, choose_files)
    if not found.chosen:
        raise not_convertible(repo, found.names)
    return HubSnapshot(repo=repo, revision=revision, commit=found.commit, files=found.chosen, n_params=found.n_params)


def snapshot_dir(snapshot: HubSnapshot, cache_dir: Path) -> Path | None:
    """The snapshot's folder when all of it is there, was verified, and still has its sizes; no network."""
    place = Place.of(snapshot.repo, snapshot.commit, cache_dir)
    return place.folder if place.holds_verified(snapshot.files) else None


def download_snapshot(snapshot: HubSnapshot, cache_dir: Path, on_progress: Callable[[int, int], None]) -> Path:
    """Fetch what is missing, verify it, and return the snapshot's folder.

    ``on_progress`` gets bytes done and bytes in all, from worker threads but one at a time. A cut or
    killed download is continued by the next call. A file with the wrong size or hash is deleted and
    raises FetchError. One process per repository works at a time; others wait for it.
    """
    place = Place.of(snapshot.repo, snapshot.commit, cache_dir)
    download(snapshot.repo, snapshot.commit, snapshot.files, place, on_progress, revision=snapshot.revision)
    return place.folder


def snapshot_path(snapshot: HubSnapshot, cache_dir: Path) -> Path:
    """Where the snapshot's folder is, or will be."""
    return Place.of(snapshot.repo, snapshot.commit, cache_dir).folder


def snapshot_from_json(value: object) -> HubSnapshot | None:
    """A snapshot as ``dataclasses.asdict`` wrote it; None for anything else."""
    if not isinstance(value, dict):
        return None
    try:
        return HubSnapshot(**{**value, "files": tuple(RemoteFile(**file) for file in value["files"])})
    except (KeyError, TypeError):
        return None
