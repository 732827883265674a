"""A repository on the Hugging Face hub -> a checked snapshot of it on disk, pinned to one commit.

The only module that imports huggingface_hub, and only inside its functions. Files lie in that library's
own cache layout. Large (LFS) files go over plain HTTP into ``blobs/<sha256>.incomplete``, because only
plain HTTP continues where a killed process stopped: the library (2.4) resumes within one call, but throws
an unfinished file away when the call fails. Xet is left to files too large for plain HTTP, and to those
who ask for it with HF_XET_HIGH_PERFORMANCE=1. Tokens, proxies, HF_ENDPOINT and HF_HUB_OFFLINE are the
library's business and mean what they mean there.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.base import files
from toolchain.base.errors import FetchError
from toolchain.stages.hub_errors import ANEW, Stop, Where, WrongLengthError, not_convertible, patiently, require_names
from toolchain.stages.hub_files import choose_files

_WORKERS = 4
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LIBRARY_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a snapshot; ``sha256`` as the hub states it, for LFS files only."""

    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class HubSnapshot:
    """The files conversion needs from ``repo`` at ``commit``, which ``revision`` named when asked."""

    repo: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
    n_params: int | None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def resolve_snapshot(repo: str, revision: str) -> HubSnapshot:
    """Ask the hub, in one call, which commit ``revision`` is and what of it conversion needs."""
    require_names(repo, revision)

    def ask() -> Any:
        from huggingface_hub import HfApi, constants

        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    where = Where(repo, revision)
    info = patiently(ask, where)
    sizes = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    names = choose_files(sizes)
    if not names:
        raise not_convertible(repo, sorted(sizes))
    unsized = [name for name in names if not isinstance(sizes[name].size, int)]
    if unsized or not _COMMIT.fullmatch(info.sha or ""):
        lacking = f"no size for {unsized[0]}" if unsized else f"commit id {info.sha!r}"
        raise where.unusable_answer(lacking)
    return HubSnapshot(
        repo=repo,
        revision=revision,
        commit=info.sha,
        files=tuple(HubFile(name=name, bytes=sizes[name].size, sha256=_stated_sha256(sizes[name])) for name in names),
        n_params=info.safetensors.total if info.safetensors else None,
    )


def snapshot_dir(snapshot: HubSnapshot, cache_dir: Path) -> Path | None:
    """The snapshot's folder when all of it is there, was verified, and still has its sizes; no network."""
    place = _Place.of(snapshot, cache_dir)
    verified = place.verified()
    if all(verified.get(file.name) == _identity(file) and place.holds(file) for file in snapshot.files):
        return place.folder
    return None


def download_snapshot(snapshot: HubSnapshot, cache_dir: Path, on_progress: Callable[[int, int], None]) -> Path:
    """Fetch what is missing, verify it, and return the snapshot's folder.

    ``on_progress`` gets bytes done and bytes in all, from worker threads but one at a time. A cut or
    killed download is continued by the next call. A file with the wrong size or hash is deleted and
    raises FetchError. One process per repository works at a time; others wait for it.
    """
    tally = _Tally(snapshot.bytes, on_progress)
    if not (folder := snapshot_dir(snapshot, cache_dir)):
        place = _Place.of(snapshot, cache_dir)
        with files.locked(place.cache / ".locks" / f"{place.store.name}.lock"):
            for name in place.leftovers():
                files.remove(name, within=place.store)
            files.require_free(place.cache, place.missing_bytes(snapshot), f"downloading {snapshot.repo}")
            _fetch_all(snapshot, place, tally)
        folder = place.folder
    tally.finish()
    return folder


def snapshot_path(snapshot: HubSnapshot, cache_dir: Path) -> Path:
    """Where the snapshot's folder is, or will be."""
    return _Place.of(snapshot, cache_dir).folder


def snapshot_from_json(value: object) -> HubSnapshot | None:
    """A snapshot as ``dataclasses.asdict`` wrote it; None for anything else."""
    if not isinstance(value, dict):
        return None
    try:
        return HubSnapshot(**{**value, "files": tuple(HubFile(**file) for file in value["files"])})
    except (KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Place:
    """Where a snapshot lies in the cache: ``models--owner--name/{blobs,snapshots/<commit>,verified}``."""

    cache: Path
    store: Path
    folder: Path
    note: Path

    @classmethod
    def of(cls, snapshot: HubSnapshot, cache_dir: Path) -> _Place:
        cache = cache_dir.expanduser().resolve()
        store = cache / f"models--{snapshot.repo.replace('/', '--')}"
        commit = snapshot.commit
        return cls(cache, store, store / "snapshots" / commit, store / "verified" / f"{commit}.json")

    def holds(self, file: HubFile) -> bool:
        path = self.folder / file.name
        return path.is_file() and path.stat().st_size == file.bytes

    def partial(self, file: HubFile) -> Path:
        return self.store / "blobs" / f"{file.sha256}.incomplete"

    def missing_bytes(self, snapshot: HubSnapshot) -> int:
        missing = [file for file in snapshot.files if not self.holds(file)]
        partials = [self.partial(file) for file in missing if file.sha256]
        started = sum(path.stat().st_size for path in partials if path.is_file())
        return sum(file.bytes for file in missing) - started

    def leftovers(self) -> list[Path]:
        """What the library was writing when it was killed; it never returns to these."""
        found = (self.store / "blobs").glob("*.incomplete")
        return [path for path in found if _LIBRARY_LEFTOVER.fullmatch(path.name)]

    def verified(self) -> dict[str, object]:
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


class _Tally:
    """Bytes done per file, summed for the caller; also the worker threads' stop signal."""

    def __init__(self, total_bytes: int, on_progress: Callable[[int, int], None]) -> None:
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self.blob_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # equal files share a blob

    def at(self, name: str, done_bytes: int) -> None:
        with self._lock:
            self._done[name] = done_bytes
            self._on_progress(min(sum(self._done.values()), self._total_bytes), self._total_bytes)

    def more(self, name: str, n_bytes: int) -> None:
        if self.stopping.is_set():
            raise Stop
        self.at(name, self._done.get(name, 0) + n_bytes)

    def finish(self) -> None:
        self._on_progress(self._total_bytes, self._total_bytes)

    def bar_class(self, name: str) -> Any:
        """A class to give the library in place of tqdm: it counts and draws nothing."""
        tally = self

        class Bar:
            def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
                tally.at(name, initial)

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def update(self, n: float | None = 1) -> None:
                tally.more(name, int(n or 0))

            def __getattr__(self, _: str) -> Callable[..., None]:
                return lambda *args, **kwargs: None  # refresh(), close(), set_postfix_str(): drawing only

        return Bar


def _fetch_all(snapshot: HubSnapshot, place: _Place, tally: _Tally) -> None:
    verified = place.verified()
    with ThreadPoolExecutor(_WORKERS) as pool:
        jobs = {
            pool.submit(_fetch_file, snapshot, file, place, tally, verified.get(file.name)): file
            for file in sorted(snapshot.files, key=lambda file: file.bytes)
        }
        try:
            for job in as_completed(jobs):
                job.result()
                verified[jobs[job].name] = _identity(jobs[job])
                with files.disk_errors(place.note):
                    files.write_json(place.note, verified)
        except BaseException:
            tally.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_file(snapshot: HubSnapshot, file: HubFile, place: _Place, tally: _Tally, verified: object) -> None:
    """Bring one file into the snapshot folder, whole and checked."""
    where = Where(snapshot.repo, snapshot.revision, file.name, place.cache, tally.stopping)
    path = place.folder / file.name
    if not place.holds(file):
        place.discard(path)
        etag = patiently(lambda: _ask_about(snapshot, file), where).etag
        hashed = False
        if etag == file.sha256 and _over_http(file):
            with tally.blob_locks[etag]:
                hashed = _fetch_blob(snapshot, file, place, tally, where)
        patiently(lambda: _library_download(snapshot, file, place, tally), where)
        verified = _identity(file) if hashed and place.holds(file) else None
    if verified != _identity(file):
        _check(file, path, place, where)
    tally.at(file.name, file.bytes)


def _fetch_blob(snapshot: HubSnapshot, file: HubFile, place: _Place, tally: _Tally, where: Where) -> bool:
    """Download an LFS file to the blob the library will look for, continuing what an earlier run left.

    True when its hash was found right, and only then the blob got its name; False when a blob was there
    already. The hub's ETag of such a file is its SHA-256; where a mirror sends another, the library
    downloads the file whole.
    """
    partial, blob = place.partial(file), place.store / "blobs" / str(file.sha256)
    if blob.is_file() and blob.stat().st_size == file.bytes:
        return False
    place.discard(blob)
    if partial.is_file() and partial.stat().st_size > file.bytes:
        partial.unlink()

    def get() -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as handle:
            http_get(
                hf_hub_url(snapshot.repo, file.name, revision=snapshot.commit),
                handle,
                resume_size=handle.tell(),
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=file.bytes,
                displayed_filename=file.name,
                tqdm_class=tally.bar_class(file.name),
            )

    try:
        patiently(get, where)
    except WrongLengthError:
        partial.unlink(missing_ok=True)
        raise
    _check(file, partial, place, where)
    with files.disk_errors(blob):
        files.promote(partial, blob)
    return True


def _ask_about(snapshot: HubSnapshot, file: HubFile) -> Any:
    """The hub's metadata of one file, asked for once: the library's own retries would take half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(
        hf_hub_url(snapshot.repo, file.name, revision=snapshot.commit),
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )


def _library_download(snapshot: HubSnapshot, file: HubFile, place: _Place, tally: _Tally) -> None:
    """Let the library put the file in its snapshot folder; with the blob there it only makes the link."""
    from huggingface_hub import constants, hf_hub_download

    hf_hub_download(
        snapshot.repo,
        file.name,
        revision=snapshot.commit,
        cache_dir=place.cache,
        etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        tqdm_class=tally.bar_class(file.name),
    )


def _over_http(file: HubFile) -> bool:
    from huggingface_hub import constants

    return file.bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE and not constants.HF_XET_HIGH_PERFORMANCE


def _check(file: HubFile, path: Path, place: _Place, where: Where) -> None:
    """Compare size and, for LFS files, hash with what the hub stated; delete the file if they differ."""
    size = path.stat().st_size if path.is_file() else 0
    found = f"{size} bytes" if size != file.bytes else ""
    expected = f"{file.bytes} bytes"
    if not found and file.sha256 and (sha256 := files.sha256_file(path)) != file.sha256:
        found, expected = f"sha256 {sha256}", f"sha256 {file.sha256}"
    if found:
        place.discard(path)
        raise FetchError(
            f"{file.name} of {where.repo} did not arrive as the hub states it; it was deleted",
            evidence=f"expected {expected}\nreceived {found}",
            hint=ANEW,
        )


def _identity(file: HubFile) -> list[object]:
    return [file.bytes, file.sha256]


def _stated_sha256(sibling: Any) -> str | None:
    stated = sibling.lfs.sha256 if sibling.lfs else None
    return stated if isinstance(stated, str) and _SHA256.fullmatch(stated) else None
