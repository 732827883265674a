"""The ABI verdict when a program starts: compared once, then remembered by the files that it was about."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from toolchain.base import files
from toolchain.base.abi import Layout, compare, declared_layout
from toolchain.base.errors import ArtifactError, FoundryError

LAYOUT_FILE = "abi.json"
"""In the package llama_cpp of our wheels: how C lays out what the bindings declare, and the SHA-256 of the
libraries that this is true of."""


def require_agreement(package: Path, library: Path, modules: Iterable[ModuleType]) -> str:
    """Why nothing can be said of the imported ``modules`` of ``package`` with ``library``; empty: they agree.

    Raises ArtifactError, with struct and field, when they disagree. The verdict is kept below FOUNDRY_HOME's
    folder ``work``, under the modules' names and the names, sizes and times of the package's files and of the libraries
    beside ``library``, so that only the first call compares. Where nothing can be written, each call does.
    """
    libraries = sorted(path for path in library.parent.glob("lib*") if path.is_file())
    sources = (*sorted(package.glob("*.py")), package / LAYOUT_FILE, *libraries)
    modules = list(modules)
    seen: list[list[str | int]] = [[module.__name__ for module in modules]]
    seen += [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sources if path.is_file()]
    note = files.foundry_home() / "work" / "abi" / f"{files.digest(seen)[:32]}.json"
    match files.read_json(note):
        case {"unknown": str(why)}:
            return why
    why = _compared(package, libraries, modules)
    with suppress(FoundryError, OSError):
        files.write_json(note, {"unknown": why})
    return why


def _compared(package: Path, libraries: Iterable[Path], modules: Iterable[ModuleType]) -> str:
    noted = files.read_json(package / LAYOUT_FILE)
    if not isinstance(noted, dict):
        return f"llama_cpp in {package} was not built here, so nobody knows whether its structs match its library"
    faults = compare(declared_layout(modules), Layout.from_json(noted))
    if faults:
        raise ArtifactError(
            f"the Python bindings disagree with their library ({len(faults)} faults)",
            evidence="\n".join((*faults, f"in {package}")),
            hint="run `./inv doctor`, then `./inv build` (or `./inv use ID`), which installs them again",
        )
    match noted:
        case {"libraries": dict(proven)}:
            there = {path.name: path for path in libraries}
            for name, digest in proven.items():
                if name not in there or files.sha256_file(there[name]) != digest:
                    return f"{name} beside llama_cpp is not the one that it was proven with"
            return ""
    return f"{package / LAYOUT_FILE} names no libraries"
