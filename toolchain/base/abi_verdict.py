"""The ABI verdict when a program starts: compared once, then remembered by the files that it was about."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from toolchain.base import files
from toolchain.base.abi import Layout, compare, declared_layout
from toolchain.base.errors import ArtifactError

LAYOUT_FILE = "abi.json"
"""In the package llama_cpp of our wheels: how C lays out what the bindings declare, and the SHA-256 of the
libraries that this is true of."""


def require_agreement(package: Path, library: Path, modules: Iterable[ModuleType]) -> str:
    """Why nothing can be said of the imported ``modules`` of ``package`` with ``library``; empty: they agree.

    Raises ArtifactError, with struct and field, when they disagree. The verdict is kept in FOUNDRY_HOME/work/abi
    under the names, sizes and times of the files, so that only the first call compares.
    """
    sources = sorted((*package.glob("*.py"), package / LAYOUT_FILE, library))
    seen = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sources if path.is_file()]
    note = files.home_dir("work") / "abi" / f"{files.digest(seen)[:32]}.json"
    match files.read_json(note):
        case {"unknown": str(why)}:
            return why
    why = _compared(package, library, modules)
    files.write_json(note, {"unknown": why})
    return why


def _compared(package: Path, library: Path, modules: Iterable[ModuleType]) -> str:
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
    libraries = noted.get("libraries")
    if not isinstance(libraries, dict) or libraries.get(library.name) != files.sha256_file(library):
        return f"{library} is another library than the one that llama_cpp was proven with"
    return ""
