"""Project directories, locks, atomic promotion, hashing and guarded deletion.

Whatever can be rebuilt lives under FOUNDRY_HOME; results go to ``models/<recipe name>/`` in the project.
A file or folder is made beside its final name and renamed into place when it is whole and on disk, so a
kill at any moment leaves either the finished thing or nothing that looks like it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.base.errors import FoundryError, MissingError

PARTIAL = ".partial-"
PROJECT_ROOT = Path(__file__).resolve().parents[2]


def expand(typed: str) -> Path:
    """The path that was typed, ``~`` being the user's home; the home of nobody stays as it was typed."""
    return Path(os.path.expanduser(typed))


def foundry_home() -> Path:
    """FOUNDRY_HOME, else ``llama-foundry`` in the user's cache directory."""
    if named := os.environ.get("FOUNDRY_HOME"):
        return expand(named).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llama-foundry"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "llama-foundry"


def models_dir() -> Path:
    """Where results go: FOUNDRY_MODELS, else ``models`` in the project."""
    named = os.environ.get("FOUNDRY_MODELS")
    return expand(named).absolute() if named else PROJECT_ROOT / "models"


def home_dir(name: str) -> Path:
    """``FOUNDRY_HOME/name``, made when missing. Names in use: sources toolchains hub work logs tune (all of
    which can be made again), sessions and chat-history.
    """
    path = foundry_home() / name
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel lets go of it when the holder dies.

    ``on_wait`` is told the holder's process id when the lock is taken already.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            if on_wait:
                on_wait(handle.read().strip() or "unknown")
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


@contextmanager
def home_in_use() -> Iterator[None]:
    """Hold FOUNDRY_HOME against `inv clean` while something is made in it; any number may hold it."""
    with (home_dir("work").parent / ".in-use").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


@contextmanager
def home_alone() -> Iterator[bool]:
    """Whether nobody else uses FOUNDRY_HOME; while the body runs, nobody begins to."""
    with (home_dir("work").parent / ".in-use").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A fresh path beside ``final`` for a file or folder to be promoted; taken away at the end.

    What an earlier, killed attempt left for the same name is removed first. Call it under a lock when
    two processes can make the same thing.
    """
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for stale in final.parent.glob(f"{PARTIAL}*-{final.name}"):
            remove(stale, within=final.parent)
        scratch = Path(tempfile.mkdtemp(prefix=PARTIAL, suffix=f"-{final.name}", dir=final.parent))
        try:
            yield scratch / final.name
        finally:
            remove(scratch, within=final.parent)


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """As ``staging``, and promoted to ``final`` when the body succeeds."""
    with staging(final) as partial:
        yield partial
        promote(partial, final)


def promote(partial: Path, final: Path) -> None:
    """Bring ``partial`` to disk and rename it to ``final``; the rename is the moment it exists."""
    if partial.is_dir():
        os.sync()  # one for the whole folder: a source tree has thousands of files
        if final.exists():
            remove(final, within=final.parent)
    else:
        _fsync(partial)
    partial.replace(final)
    _fsync(final.parent)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` in one atomic step; of two writers at once, the last one stays."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=PARTIAL, suffix=f"-{path.name}", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as sink:
                sink.write(json.dumps(value, indent=2) + "\n")
            Path(name).chmod(0o644)
            promote(Path(name), path)
        finally:
            Path(name).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; for one who holds the lock that its writers take."""
    for stale in folder.glob(f"{PARTIAL}*"):
        remove(stale, within=folder)


def read_json(path: Path) -> object:
    """The JSON in ``path``; None when it is missing or unreadable (it is then made again)."""
    try:
        value: object = json.loads(path.read_text())
        return value
    except (OSError, ValueError):
        return None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest(value: object) -> str:
    """Hex SHA-256 of ``value`` as canonical JSON: the identity of a request or a step."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":")))


def known_sha256(path: Path) -> str:
    """SHA-256 of ``path``, remembered by its inode, size and mtime: a 26 GB file is hashed once."""
    stat = path.stat()
    seen = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
    note = home_dir("work") / "digests" / f"{sha256_text(str(path.resolve()))[:32]}.json"
    match read_json(note):
        case {"seen": known, "sha256": str(value)} if known == seen:
            return value
    value = sha256_file(path)
    write_json(note, {"path": str(path), "seen": seen, "sha256": value})
    return value


def tree_digest(root: Path, *, skip: frozenset[str] = frozenset({".git"})) -> str:
    """Digest of a folder: relative names and contents of its files; a symbolic link counts by its target.

    Folders named in ``skip`` are passed over at every depth.
    """
    total = hashlib.sha256()
    for folder, subfolders, names in os.walk(root):
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        subfolders[:] = sorted(name for name in subfolders if name not in skip)
        for name in sorted([*names, *links]):
            path = Path(folder) / name
            if path.is_symlink():
                content = f"link:{os.readlink(path)}"
            elif path.is_file():
                content = sha256_file(path)
            else:
                continue
            total.update(os.fsencode(f"{path.relative_to(root)}\0{content}\n"))
    return total.hexdigest()


def tree_bytes(root: Path) -> int:
    """Bytes of all regular files below ``root``."""
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and not p.is_symlink())


def remove(path: Path, *, within: Path) -> None:
    """Delete a file or folder that lies below ``within``; anything else is refused."""
    target = path.absolute()
    if within.absolute() not in target.parents:
        raise ValueError(f"refusing to delete {target}: not below {within}")
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target, ignore_errors=True)
    else:
        target.unlink(missing_ok=True)


def require_free(path: Path, needed_bytes: int, what: str) -> None:
    """Raise MissingError when the file system of ``path`` has less than ``needed_bytes`` free."""
    probe = existing(path)
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise MissingError(
            f"not enough disk space for {what}",
            evidence=f"{probe}: {free / 2**30:.2f} GiB free, about {needed_bytes / 2**30:.2f} GiB needed",
            hint=f"free some space, run `./inv clean`, or {_elsewhere(path)}",
        )


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def is_full(path: Path) -> bool:
    """Whether the file system of ``path`` has less than 1 MiB left: a child that failed there failed for that."""
    return shutil.disk_usage(existing(path)).free < 1 << 20


def disk_full(path: Path, evidence: str) -> MissingError:
    return MissingError(
        f"the disk is full while writing {path}",
        evidence=evidence,
        hint=f"free some space, run `./inv clean`, or {_elsewhere(path)}",
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's disk errors into MissingError that names ``path``."""
    try:
        yield
    except OSError as error:
        if translated := disk_error(error, path):
            raise translated from error
        raise


def disk_error(error: OSError, path: Path) -> FoundryError | None:
    """The MissingError for a disk that is full or may not be written at ``path``; None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(path, str(error))
    elsewhere = isinstance(error.filename, str) and path not in (named := Path(error.filename), *named.parents)
    elsewhere = elsewhere and path.parent not in named.parents and named not in path.parents
    if (
        error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
        and not elsewhere
    ):
        return MissingError(f"cannot write {path}", evidence=str(error), hint=_elsewhere(path))
    return None


def _elsewhere(path: Path) -> str:
    if foundry_home() in (path, *path.parents):
        return "set FOUNDRY_HOME to another disk or directory"
    if models_dir() in (path, *path.parents):
        return "set FOUNDRY_MODELS to another disk or directory"
    return "choose another place"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
