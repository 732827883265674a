"""Sources from git: a ref resolved to a commit through the repository's mirror, written out with its submodules."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from toolchain.base import console, files
from toolchain.base.errors import CommandError, FetchError, UsageError
from toolchain.build import mirror as mirrors
from toolchain.build.mirror import Mirror
from toolchain.build.pin import SourcePin, SourceTree, is_local, locate, record, recorded, ref_note

MAX_SUBMODULES = 64
"""Of one source, at all depths: llama-cpp-python has had 2 at most, and a hostile tree can name thousands."""


@dataclass(frozen=True, kw_only=True)
class Submodule:
    """A commit of the repository ``url`` that belongs at ``path`` of the tree."""

    path: str
    url: str
    commit: str


def fetch_git(pin: SourcePin, update: bool) -> SourceTree:
    """The tree of the recorded commit, or of the commit that the ref names now; see ``source.fetch_source``.

    A commit that is recorded and unpacked costs no git call; one that the mirror has costs no connection. A branch
    or tag that cannot be asked for is taken as it was fetched before, with a warning; FetchError with ``update``.
    """
    note = ref_note(pin)
    if tree := _unpacked(pin, note, update):
        return tree
    local = is_local(pin.name)
    if why := mirrors.refused(pin.name, local=local):
        raise UsageError(f"cannot fetch {pin}", evidence=why, hint="write git:https://HOST/PATH@REF or git:./DIR@REF")
    mirror = mirrors.mirror_of(pin.name, local=local)
    with files.locked(note.with_suffix(".lock"), lambda pid: console.say(f"waiting for process {pid} ({pin})")):
        if tree := _unpacked(pin, note, update):
            return tree
        known = None if update else _noted(note)
        commit = known if known and mirrors.holds(mirror, known) else mirrors.resolve(mirror, pin.ref, update=update)
        final = _folder(pin, commit)
        with files.locked(final.with_name(final.name + ".lock")):
            if recorded(final) is None:
                with files.staging(final) as partial:
                    _make_tree(pin, mirror, commit, partial)
                    files.promote(partial, final)
        files.write_json(note, {"pin": str(pin), "commit": commit})
    done = recorded(final)
    assert done is not None
    return replace(done, pin=str(pin))


def read_submodules(mirror: Mirror, commit: str) -> list[Submodule]:
    """What ``.gitmodules`` and the links of a commit ask for; FetchError when any entry is not safe.

    Refused: names and paths that are absolute, climb with ``..`` or enter ``.git``, and URLs that are options, run
    a program (``ext::``) or, unless the pin itself is local, name a repository on this machine.
    """
    listed = [entry.split("\t", 1) for entry in mirrors.ask(mirror, "ls-tree", "-r", "-z", commit).split("\0") if entry]
    modes = {path: stated.split()[0] for stated, path in listed}
    links = {path: stated.split()[2] for stated, path in listed if stated.startswith("160000 ")}
    entries = _read_entries(mirror, commit) if modes.get(".gitmodules") in ("100644", "100755") else {}
    for name, entry in entries.items():
        path, url = entry.get("path"), entry.get("url")
        if why := _unsafe_path(name) or (_unsafe_path(path) if path is not None else ""):
            raise _refused(f"submodule {name!r} of {mirror.url}", f"path {path!r}: {why}")
        if url is not None and (why := mirrors.refused(_absolute_url(mirror.url, url), local=mirror.local)):
            raise _refused(f"submodule {name!r} of {mirror.url}", f"url {url!r}: {why}")
    for path in sorted(links.keys() - {entry.get("path") for entry in entries.values() if "url" in entry}):
        console.warn(f"{path} stays empty: .gitmodules of {mirror.url} does not tell where it comes from")
    return [
        Submodule(path=path, url=_absolute_url(mirror.url, entry["url"]), commit=links[path])
        for entry in entries.values()
        if (path := entry.get("path", "")) in links and "url" in entry and entry.get("update") != "none"
    ]


def _unpacked(pin: SourcePin, note: Path, update: bool) -> SourceTree | None:
    commit = pin.ref if mirrors.is_full(pin.ref) else None if update else _noted(note)
    tree = recorded(_folder(pin, commit)) if commit else None
    return replace(tree, pin=str(pin)) if tree else None


def _noted(note: Path) -> str | None:
    match files.read_json(note):
        case {"commit": str(commit)}:
            return commit
    return None


def _make_tree(pin: SourcePin, mirror: Mirror, commit: str, root: Path) -> None:
    """Write the commit and its submodules into the new folder ``root``, and record what it is."""
    root.mkdir()
    links: dict[str, str] = {}
    try:
        _write(mirror, commit, root, Path(), links)
    except CommandError as error:
        raise FetchError(
            f"cannot unpack {pin}",
            evidence=error.evidence,
            hint=f"if it stays so, delete {mirror.folder} and try again",
        ) from error
    for link in _links_outside(root):
        raise _refused(str(pin), f"{link.relative_to(root)} links outside, to {os.readlink(link)}")
    llama, bindings = locate(root, str(pin))
    vendored = links.get(llama.relative_to(root).as_posix(), commit)
    record(root, SourceTree(pin=str(pin), llama=llama, bindings=bindings, digest=commit, commit=vendored))


def _write(mirror: Mirror, commit: str, root: Path, below: Path, links: dict[str, str]) -> None:
    """Write ``commit`` to ``root/below`` and its submodules inside; ``links`` gains path and commit of each."""
    mirrors.write_files(mirror, commit, root / below, root.with_name("index"))
    for submodule in read_submodules(mirror, commit):
        place = below / submodule.path
        folder = root / place
        if folder.resolve() != root.resolve() / place or not folder.is_dir() or any(folder.iterdir()):
            raise _refused(mirror.url, f"its submodule {place} leads elsewhere, or is no empty folder")
        links[place.as_posix()] = submodule.commit
        if len(links) > MAX_SUBMODULES:
            raise _refused(mirror.url, f"more than {MAX_SUBMODULES} submodules: {', '.join(links)}")
        # a repository from elsewhere may not name one of this machine, also when the pin is local
        inner = mirrors.mirror_of(submodule.url, local=mirror.local and is_local(submodule.url))
        _write(inner, mirrors.resolve(inner, submodule.commit, update=False), root, place, links)


def _read_entries(mirror: Mirror, commit: str) -> dict[str, dict[str, str]]:
    """``.gitmodules`` by submodule name: its path, url and the rest."""
    entries: dict[str, dict[str, str]] = {}
    listing = mirrors.ask(mirror, "config", "--no-includes", "--blob", f"{commit}:.gitmodules", "-z", "--list")
    for key, _, value in (line.partition("\n") for line in listing.split("\0") if line):
        if found := re.fullmatch(r"submodule\.(.*)\.([^.]+)", key, re.DOTALL):
            entries.setdefault(found[1], {})[found[2]] = value
    return entries


def _absolute_url(base: str, url: str) -> str:
    """``url`` as git reads it in .gitmodules: one that starts with ./ or ../ is relative to ``base``, which names the
    repository itself. "" when it climbs above the base's host.
    """
    if not url.startswith(("./", "../")):
        return url
    parted = re.fullmatch(r"([a-z]+://[^/]*/|[^/:]+:/?|/)(.*)", base)
    parts = parted[2].rstrip("/").split("/") if parted else []
    for part in url.rstrip("/").split("/"):
        if part == "..":
            if not parts:
                return ""
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return (parted[1] if parted else "") + "/".join(parts)


def _unsafe_path(text: str) -> str:
    parts = PurePosixPath(text).parts
    if not parts:
        return "it is empty"
    if text.startswith(("/", "-")) or "\\" in text or ".." in parts:
        return "it leads outside"
    return "it enters .git" if any(part.lower() == ".git" for part in parts) else ""


def _links_outside(root: Path) -> list[Path]:
    """The symbolic links below ``root`` that lead out of it, be it by way of another."""
    found = []
    for folder, subfolders, names in os.walk(root):
        for path in (Path(folder, name) for name in (*subfolders, *names)):
            if path.is_symlink():
                target = os.readlink(path)
                lexical = os.path.normpath(os.path.join(os.path.relpath(folder, root), target))
                real = Path(os.path.realpath(path))
                inside = root.resolve() in (real, *real.parents)
                if os.path.isabs(target) or lexical.split(os.sep)[0] == ".." or not inside:
                    found.append(path)
    return found


def _refused(what: str, why: str) -> FetchError:
    return FetchError(
        f"{what} is not safe to unpack",
        evidence=why,
        hint="use another source, or check out what you trust yourself and build from path:DIR",
    )


def _folder(pin: SourcePin, commit: str) -> Path:
    return files.home_dir("sources") / f"git-{files.sha256_text(pin.name)[:8]}-{commit[:12]}"
