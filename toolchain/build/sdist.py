"""Source archives of llama-cpp-python from the package index: found, hashed, unpacked safely."""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.base import files
from toolchain.base.command import OnProgress
from toolchain.base.errors import FetchError, FoundryError
from toolchain.build import index
from toolchain.build.pin import SourcePin, SourceTree, locate, record, recorded, ref_note

if TYPE_CHECKING:
    from unearth import Link

# SHA-256 of the archives that this project is tested with; another version is taken with
# `#sha256=...` behind its pin, or on the word of the index.
KNOWN_SHA256 = {
    "llama-cpp-python==0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    "llama-cpp-python==0.2.57": "bd81dbc4bc03b7deca3be0496330705d4c53bba726f7c3a47d556c7ec2452304",
}

MAX_MEMBERS = 50_000
MAX_UNPACKED_BYTES = 4 << 30


def fetch_sdist(pin: SourcePin, on_progress: OnProgress | None) -> SourceTree:
    """The archive's tree; see ``source.fetch_source``."""
    expected = pin.sha256 or KNOWN_SHA256.get(f"{pin.name}=={pin.ref}") or _stated_before(pin)
    if expected and (tree := recorded(_folder(pin, expected))):
        return tree
    requirement = f"{pin.name}=={pin.ref}"
    what = f"source archive of {requirement}"
    try:
        finder = index.package_finder(source_of=[pin.name])
        link = index.best_link(finder, requirement, what=what)
        expected = expected or _stated_sha256(link)
        final = _folder(pin, expected)
        with files.locked(final.with_name(final.name + ".lock")):
            if tree := recorded(final):
                return tree
            files.require_free(final, 1 << 30, f"the {what}")
            with files.staged(final) as partial:
                partial.mkdir()
                archive = partial / link.filename
                found = index.download(finder, link.normalized, archive, on_progress)
                if found != expected:
                    raise index.wrong_hash(link.filename, expected=expected, found=found)
                commit = unpack(archive, partial)
                archive.unlink()
                llama, bindings = locate(partial, str(pin))
                tree = SourceTree(
                    pin=str(pin),
                    llama=llama,
                    bindings=bindings,
                    digest=found,
                    commit=commit or f"sdist-{found[:12]}",
                )
                record(partial, tree)
        files.write_json(ref_note(pin), {"pin": str(pin), "sha256": expected})
    except (FoundryError, KeyboardInterrupt):
        raise
    except OSError as error:
        raise files.disk_error(error, files.home_dir("sources")) or index.unreachable(what, error) from error
    except Exception as error:  # the client library's own errors have no common root
        raise index.unreachable(what, error) from error
    done = recorded(final)
    assert done is not None
    return done


def _stated_sha256(link: Link) -> str:
    stated = index.stated_sha256(link)
    if stated is None:
        raise FetchError(
            f"the package index states no sha256 for {link.filename}",
            hint="put it behind the pin: sdist:NAME==VERSION#sha256=HEX",
        )
    return stated


def _stated_before(pin: SourcePin) -> str | None:
    noted = files.read_json(ref_note(pin))
    return str(noted["sha256"]) if isinstance(noted, dict) and "sha256" in noted else None


def unpack(archive: Path, into: Path) -> str:
    """Unpack a ``.tar.gz`` below ``into``, without its outer folder; llama.cpp's commit if it tells.

    Refuses absolute names, ``..``, links that lead outside, devices and bombs (FetchError) before a byte of
    them is written. The archive's own ``.git`` is read for the commit and not unpacked: its hooks and
    configuration are not ours to run.
    """
    commit = ""
    unpacked = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for count, member in enumerate(tar):
                parts = Path(member.name).parts
                unpacked += member.size
                if count > MAX_MEMBERS or unpacked > MAX_UNPACKED_BYTES:
                    raise _unsafe(archive, member.name, "the archive unpacks to more than any source does")
                if why := _unsafe_member(member):
                    raise _unsafe(archive, member.name, why)
                inner = parts[1:]
                if ".git" in inner:
                    if inner[-4:] == ("modules", "vendor", "llama.cpp", "HEAD") and (head := tar.extractfile(member)):
                        commit = head.read(64).decode(errors="replace").strip()
                    continue
                if not inner:
                    continue
                member.name = str(Path(*inner))
                if sys.version_info >= (3, 11, 4):
                    tar.extract(member, into, filter="data")
                else:
                    tar.extract(member, into, set_attrs=False)
    except (tarfile.TarError, EOFError) as error:
        raise FetchError(f"{archive.name} cannot be unpacked", evidence=str(error), hint="fetch it again") from error
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else ""


def _unsafe_member(member: tarfile.TarInfo) -> str:
    parts = Path(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        return "its name leads outside"
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        return "it is neither file, folder nor link"
    if member.issym() or member.islnk():
        base = Path(*parts[:-1]) if member.issym() else Path()
        depth = 0
        for part in (base / member.linkname).parts:
            depth += -1 if part == ".." else 1
            # the outer folder is stripped, so a link may not climb above it
            if part == "/" or depth < 1:
                return f"it links outside, to {member.linkname}"
    return ""


def _unsafe(archive: Path, name: str, why: str) -> FetchError:
    return FetchError(
        f"{archive.name} is not safe to unpack", evidence=f"{name}: {why}", hint="do not use that archive"
    )


def _folder(pin: SourcePin, sha256: str) -> Path:
    return files.home_dir("sources") / f"sdist-{pin.name}-{pin.ref}-{sha256[:12]}"
