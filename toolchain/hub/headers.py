"""The headers of GGUF files on the hub, by ranged reads, each as a file that every reader of GGUF takes.

A header is stored as a sparse file of the remote file's size: the header is there, the tensor data is a hole.
``toolchain.base.gguf.read_header`` checks it like a whole file, and llama.cpp opens it where it allocates no
tensors. It lies at ``models--owner--name/headers/<sha256>.header`` of the hub cache, with a link of the file's own
name in ``headers/<commit>/``, since the shards of a split model find each other by their names.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toolchain.base import files
from toolchain.base.errors import FetchError
from toolchain.base.gguf import HeaderLimits, parse_header
from toolchain.hub.errors import ANEW, Stop, Where, patiently
from toolchain.hub.ggufs import Quant, RepoListing, gguf_path
from toolchain.hub.place import Place
from toolchain.hub.repository import RemoteFile

if TYPE_CHECKING:
    import httpx2

_WORKERS: Final = 4
_FIRST_BYTES: Final = 1 << 20  # most of a header is its vocabulary: 0.5 MB for 32,000 tokens, 6 MB for 150,000
_LATER_SHARD_BYTES: Final = 1 << 18  # these tell of their tensors only
_SLACK_BYTES: Final = 1 << 16  # by which the headers of one model's quants differ
_CUTS: Final = 5  # connections that may break in one read, each after something came
_LATER_SHARD: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def remote_header(listing: RepoListing, file: RemoteFile, cache_dir: Path) -> Path:
    """A sparse file of the remote file's size with its header; nothing is asked when it is there already.

    Reads 1 MiB and then as much again as it has for as long as the header goes on, never more than HeaderLimits
    allow. Raises FetchError as downloads do, ArtifactError when it is no GGUF or lies in its header.
    """
    return _headers(listing, (file,), cache_dir, lambda done, total: None)[file]


def quant_headers(
    listing: RepoListing, quants: Iterable[Quant], cache_dir: Path, on_progress: Callable[[int, int], None]
) -> dict[str, tuple[Path, ...]]:
    """By quant, a path for each of its files in shard order, with the header in it; a few are fetched at a time.

    Each header is read whole, vocabulary and all; the first one tells how much to ask for of the others. A quant
    that was downloaded is answered with its own files. ``on_progress`` gets headers done and in all, one
    call at a time.
    """
    wanted = tuple(quants)
    local = {quant.name for quant in wanted if gguf_path(listing, quant, cache_dir)}
    remote = [file for quant in wanted if quant.name not in local for file in quant.files]
    fetched = _headers(listing, remote, cache_dir, on_progress)
    folder = Place.of(listing.repo, listing.commit, cache_dir).folder
    return {
        quant.name: tuple(folder / file.name if quant.name in local else fetched[file] for file in quant.files)
        for quant in wanted
    }


def _headers(
    listing: RepoListing, wanted: Iterable[RemoteFile], cache_dir: Path, on_progress: Callable[[int, int], None]
) -> dict[RemoteFile, Path]:
    place = Place.of(listing.repo, listing.commit, cache_dir)
    paths = {file: place.store / "headers" / listing.commit / file.name for file in wanted}
    if all(_holds(path, file) for file, path in paths.items()):
        return paths
    with files.locked(place.cache / ".locks" / f"{place.store.name}.headers.lock"):
        missing = {_blob(listing, file, place): file for file, path in paths.items() if not _holds(path, file)}
        done_before = len(paths) - len(missing)
        for done, _ in enumerate(_fetch_all(listing, missing), start=done_before + 1):
            on_progress(done, len(paths))
        for file, path in paths.items():
            _link(path, _blob(listing, file, place))
    return paths


def _fetch_all(listing: RepoListing, missing: Mapping[Path, RemoteFile]) -> Iterator[None]:
    """Fetch them, yielding after each; the first failure stops all."""
    stopping = threading.Event()
    first_bytes = _FIRST_BYTES
    leading = [blob for blob, file in missing.items() if not _LATER_SHARD.search(file.name)]
    with ThreadPoolExecutor(_WORKERS) as pool:

        def start(blob: Path) -> Future[int]:
            n_bytes = first_bytes if blob in leading else _LATER_SHARD_BYTES
            return pool.submit(_fetch, listing, missing[blob], blob, stopping, n_bytes)

        try:
            for blob in leading[:1]:
                first_bytes = start(blob).result() + _SLACK_BYTES
                yield
            for job in as_completed([start(blob) for blob in missing if blob not in leading[:1]]):
                job.result()
                yield
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _blob(listing: RepoListing, file: RemoteFile, place: Place) -> Path:
    """Where the bytes lie: by content where the hub states it, so that a new commit of the same file asks nothing."""
    key = file.sha256 or files.digest([listing.commit, file.name])
    return place.store / "headers" / f"{key}.header"


def _holds(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes


def _link(path: Path, blob: Path) -> None:
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))


def _fetch(listing: RepoListing, file: RemoteFile, blob: Path, stopping: threading.Event, first_bytes: int) -> int:
    """Read until the parser has seen the whole header, keep that much, and tell how much it was."""
    if _holds(blob, file):
        return _FIRST_BYTES
    where = Where(listing.repo, listing.revision, file.name, blob.parent, stopping)
    arriving = _Arriving(listing, file, where, first_bytes)
    header = parse_header(arriving, Path(listing.repo, file.name), file.bytes)
    with files.disk_errors(blob), files.staged(blob) as partial, partial.open("wb") as sink:
        sink.write(arriving.getbuffer()[: header.data_offset])
        sink.truncate(file.bytes)
    return header.data_offset


class _Arriving(io.BytesIO):
    """The beginning of a remote file: a read beyond what came fetches more of it."""

    def __init__(self, listing: RepoListing, file: RemoteFile, where: Where, first_bytes: int) -> None:
        super().__init__()
        self._listing, self._file, self._where, self._first_bytes = listing, file, where, first_bytes

    @property
    def _came(self) -> int:
        return self.getbuffer().nbytes

    def read(self, size: int | None = -1, /) -> bytes:
        end = self._file.bytes if size is None or size < 0 else min(self.tell() + size, self._file.bytes)
        if end > self._came:
            most = min(self._file.bytes, HeaderLimits().header_bytes)
            self._bring(max(end, min(most, max(self._first_bytes, 2 * self._came))))
        return super().read(size)

    def _bring(self, goal: int) -> None:
        """Read up to byte ``goal``; a broken connection is taken up where it broke."""
        for _ in range(_CUTS):
            before, failure = self._came, None
            try:
                patiently(lambda: self._get(goal), self._where)
            except FetchError as error:
                failure = error
            if self._came >= goal:
                return
            if self._came == before:
                break
        raise failure or self._wrong_size(f"{self._came} bytes")

    def _get(self, goal: int) -> None:
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self._listing.repo, self._file.name, revision=self._listing.commit)
        asked = {"Accept-Encoding": "identity", "Range": f"bytes={self._came}-{goal - 1}"}
        headers = {**build_hf_headers(), **asked}  # the client drops the token where it is sent to another host
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
            if response.status_code == 416:
                raise self._wrong_size(f"fewer than {goal} bytes")
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            skip = self._leading(response)
            for chunk in response.iter_bytes():
                if self._where.stopping.is_set():
                    raise Stop
                wanted = memoryview(chunk)[skip : skip + goal - self._came]
                skip = max(0, skip - len(chunk))
                self._append(wanted)
                if self._came >= goal and len(wanted) < len(chunk):
                    return  # more came than was asked for: the rest is left unread

    def _leading(self, response: httpx2.Response) -> int:
        """How many bytes of the body are there already; raises when it is not a part of the listed file."""
        stated = response.headers.get("Content-Range", "")
        match response.status_code, _CONTENT_RANGE.fullmatch(stated):
            case 206, re.Match() as part if int(part[1]) == self._came:
                total = part[2]
            case 200, _:  # it knows no ranges
                total = response.headers.get("Content-Length", "*")
            case status, _:
                raise self._where.unusable_answer(f"HTTP {status}, Content-Range: {stated or '(none)'}")
        if total not in ("*", str(self._file.bytes)):
            raise self._wrong_size(f"{total} bytes")
        return self._came if response.status_code == 200 else 0

    def _append(self, chunk: memoryview) -> None:
        at = self.tell()
        self.seek(0, os.SEEK_END)
        self.write(chunk)
        self.seek(at)

    def _wrong_size(self, found: str) -> FetchError:
        return FetchError(
            f"{self._where} is not of the size that the hub states",
            evidence=f"stated {self._file.bytes} bytes\nserved {found}",
            hint=ANEW,
        )
