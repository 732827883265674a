"""Files of a repository at one commit -> the same files on disk, verified; a cut download is continued.

Files lie in the hub library's own cache layout. Large (LFS) files go over plain HTTP into
``blobs/<sha256>.incomplete``, because only plain HTTP continues where a killed process stopped: the library
(2.4) resumes within one call, but throws an unfinished file away when the call fails. Xet is left to files
too large for plain HTTP, and to those who ask for it with HF_XET_HIGH_PERFORMANCE=1. Tokens, proxies,
HF_ENDPOINT and HF_HUB_OFFLINE are the library's business and mean what they mean there.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.base import files
from toolchain.base.errors import FetchError
from toolchain.hub.errors import ANEW, Stop, Where, WrongLengthError, patiently
from toolchain.hub.place import Place, identity
from toolchain.hub.repository import RemoteFile

_WORKERS = 4


def download(
    repo: str,
    commit: str,
    wanted: Sequence[RemoteFile],
    place: Place,
    on_progress: Callable[[int, int], None],
    *,
    revision: str,
) -> None:
    """Bring ``wanted`` to ``place``; promises and errors are those of ``snapshot.download_snapshot``.

    ``revision`` is what the user knows ``commit`` by, for messages.
    """
    total_bytes = sum(file.bytes for file in wanted)
    tally = _Tally(total_bytes, on_progress)
    if not place.holds_verified(wanted):
        with files.locked(place.lock):
            for name in place.leftovers():
                files.remove(name, within=place.store)
            files.require_free(place.cache, place.missing_bytes(wanted), f"downloading {repo}")
            _fetch_all(_Order(repo, revision, commit, tuple(wanted)), place, tally)
    tally.finish()


@dataclass(frozen=True)
class _Order:
    """What is to come from where."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]


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


def _fetch_all(order: _Order, place: Place, tally: _Tally) -> None:
    verified = place.verified()
    with ThreadPoolExecutor(_WORKERS) as pool:
        jobs = {
            pool.submit(_fetch_file, order, file, place, tally, verified.get(file.name)): file
            for file in sorted(order.files, key=lambda file: file.bytes)
        }
        try:
            for job in as_completed(jobs):
                job.result()
                verified[jobs[job].name] = identity(jobs[job])
                with files.disk_errors(place.note):
                    files.write_json(place.note, verified)
        except BaseException:
            tally.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_file(order: _Order, file: RemoteFile, place: Place, tally: _Tally, verified: object) -> None:
    """Bring one file into the snapshot folder, whole and checked."""
    where = Where(order.repo, order.revision, file.name, place.cache, tally.stopping)
    path = place.folder / file.name
    if not place.holds(file):
        place.discard(path)
        etag = patiently(lambda: _ask_about(order, file), where).etag
        hashed = False
        if etag == file.sha256 and _over_http(file):
            with tally.blob_locks[etag]:
                hashed = _fetch_blob(order, file, place, tally, where)
        patiently(lambda: _library_download(order, file, place, tally), where)
        verified = identity(file) if hashed and place.holds(file) else None
    if verified != identity(file):
        _check(file, path, place, where)
    tally.at(file.name, file.bytes)


def _fetch_blob(order: _Order, file: RemoteFile, place: Place, tally: _Tally, where: Where) -> bool:
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
                hf_hub_url(order.repo, file.name, revision=order.commit),
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


def _ask_about(order: _Order, file: RemoteFile) -> Any:
    """The hub's metadata of one file, asked for once: the library's own retries would take half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(
        hf_hub_url(order.repo, file.name, revision=order.commit),
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )


def _library_download(order: _Order, file: RemoteFile, place: Place, tally: _Tally) -> None:
    """Let the library put the file in its snapshot folder; with the blob there it only makes the link."""
    from huggingface_hub import constants, hf_hub_download

    hf_hub_download(
        order.repo,
        file.name,
        revision=order.commit,
        cache_dir=place.cache,
        etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        tqdm_class=tally.bar_class(file.name),
    )


def _over_http(file: RemoteFile) -> bool:
    from huggingface_hub import constants

    return file.bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE and not constants.HF_XET_HIGH_PERFORMANCE


def _check(file: RemoteFile, path: Path, place: Place, where: Where) -> None:
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
