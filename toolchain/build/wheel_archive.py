"""Whether a file is a sound wheel of llama-cpp-python: a whole archive in which every file is the one recorded."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import lzma
import re
import zipfile
import zlib
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from toolchain.base.errors import ArtifactError
from toolchain.build.wheel_offer import PROJECT

MAX_MEMBERS = 20_000
MAX_UNPACKED_BYTES = 16 << 30
"""More than any wheel of llama-cpp-python unpacks to: those with code for every GPU hold about 1.5 GB."""

ALGORITHMS = frozenset({"sha256", "sha384", "sha512"})
"""Hashes that RECORD may use (Binary distribution format: sha256 or better)."""

DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, csv.Error, EOFError, OSError, RuntimeError, ValueError)
"""What the readers of a damaged archive raise: wrong sizes, offsets before the file, unknown methods and flags."""

UNRECORDED = frozenset({"RECORD", "RECORD.jws", "RECORD.p7s"})


def check_wheel(path: Path) -> None:
    """Raise ArtifactError, which names what is wrong, unless ``path`` is a whole wheel of llama-cpp-python.

    Every file in it is read: its name stays inside, it is in RECORD, and its hash is the one there. The name and
    version inside are those of the file name, and the package ``llama_cpp`` is in it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            _check(archive, path)
    except DAMAGE as error:
        raise _unsound(path, f"the archive is damaged or cut: {error}") from error


def _check(archive: zipfile.ZipFile, path: Path) -> None:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
        raise _unsound(path, "it unpacks to more than any wheel of this package does")
    names = [member.filename for member in members]
    for name in names:
        if name.startswith("/") or ".." in PurePosixPath(name).parts or re.search(r"[\\:\0]", name):
            raise _unsound(path, f"the name {name!r} leads outside")
    if len({*names}) < len(names):
        raise _unsound(path, f"it holds {next(name for name in names if names.count(name) > 1)} twice")
    information = _information_folder(names, path)
    recorded = _recorded(archive, f"{information}/RECORD", path)
    unrecorded = {f"{information}/{name}" for name in UNRECORDED}
    if missing := sorted({*recorded} - {*names} - unrecorded):
        raise _unsound(path, f"{missing[0]} is recorded and not in it")
    for name in names:
        if name in unrecorded:
            continue
        if name not in recorded:
            raise _unsound(path, f"{name} is not in its RECORD")
        algorithm, digest = recorded[name]
        if _digest(archive, name, algorithm) != digest:
            raise _unsound(path, f"{name} is not what its RECORD says")
    _check_identity(archive, f"{information}/METADATA", path)
    if "llama_cpp/__init__.py" not in recorded:
        raise _unsound(path, "there is no package llama_cpp in it")


def _information_folder(names: list[str], path: Path) -> str:
    """``NAME-VERSION.dist-info``, of which a wheel has one."""
    folders = {name.partition("/")[0] for name in names if re.match(r"[^/]+\.dist-info/", name)}
    if len(folders) != 1:
        raise _unsound(path, f"it has {len(folders)} .dist-info folders, a wheel has one")
    (folder,) = folders
    for name in ("METADATA", "RECORD", "WHEEL"):
        if f"{folder}/{name}" not in names:
            raise _unsound(path, f"{folder}/{name} is missing")
    return folder


def _recorded(archive: zipfile.ZipFile, record: str, path: Path) -> dict[str, tuple[str, str]]:
    """File name -> (algorithm, digest) for every row of RECORD that states a hash; rows without one are for
    RECORD itself.
    """
    recorded: dict[str, tuple[str, str]] = {}
    for row in csv.reader(io.StringIO(archive.read(record).decode())):
        if len(row) < 2 or not row[1]:
            continue
        algorithm, _, digest = row[1].partition("=")
        if algorithm not in ALGORITHMS:
            raise _unsound(path, f"{row[0]} is recorded with {algorithm}, which proves nothing")
        recorded[row[0]] = algorithm, digest.rstrip("=")
    return recorded


def _digest(archive: zipfile.ZipFile, name: str, algorithm: str) -> str:
    total = hashlib.new(algorithm)
    with archive.open(name) as member:
        while chunk := member.read(1 << 20):
            total.update(chunk)
    return base64.urlsafe_b64encode(total.digest()).rstrip(b"=").decode()


def _check_identity(archive: zipfile.ZipFile, metadata: str, path: Path) -> None:
    """Name and version inside are those of the file name; pip, too, refuses anything else."""
    said = HeaderParser().parsestr(archive.read(metadata).decode(errors="replace"))
    name, version, _, _ = parse_wheel_filename(path.name)
    try:
        same = canonicalize_name(said["Name"] or "") == name == PROJECT and Version(said["Version"] or "") == version
    except InvalidVersion:
        same = False
    if not same:
        raise _unsound(path, f"inside it is {said['Name']} {said['Version']}")


def _unsound(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} is not a sound wheel of {PROJECT}",
        evidence=why,
        hint="fetch it again; if it stays so, use another wheel or build: `./inv build`",
    )
