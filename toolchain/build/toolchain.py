"""A Toolchain: one compiled llama.cpp, its converter and its wheel, under FOUNDRY_HOME/toolchains/ID."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from toolchain.base import files
from toolchain.base.errors import UsageError

Kind = Literal["llama", "trainer"]
"""llama.cpp with its wheel, or the trainer of 2023 beside it."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """A finished build. Equal ids mean equal source, options and compilers; a folder is never built over.

    ``architectures`` are those of the CUDA code in it (``sass 90``, ``ptx 90``), ``executed`` what the proof ran on
    a GPU (device, layers and how many there are) or None, with the ``reason``. ``toolkit_lib`` is the folder where
    CUDA's own libraries are found (empty without CUDA); ``needs_driver``: nothing of it starts without NVIDIA's.
    """

    id: str
    root: Path
    commit: str
    backends: tuple[str, ...]
    wheel_name: str
    wheel_version: str
    source: str
    options: tuple[str, ...]
    compilers: tuple[str, ...]
    seconds: float
    kind: Kind = "llama"
    variants: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    executed: Mapping[str, object] | None = None
    reason: str = ""
    toolkit_lib: str = ""
    needs_driver: bool = False

    @property
    def whole(self) -> bool:
        """Whether what it was linked with outside its own folder is still there."""
        return not self.toolkit_lib or Path(self.toolkit_lib).is_dir()

    @property
    def bin_dir(self) -> Path:
        return self.root / "bin"

    @property
    def lib_dir(self) -> Path:
        return self.root / "lib"

    @property
    def short_commit(self) -> str:
        return self.id.partition("-")[0]

    @property
    def convert_dir(self) -> Path:
        """The pinned converter: ``convert_hf_to_gguf.py`` with its package and gguf-py."""
        return self.root / "convert"

    @property
    def wheel(self) -> Path:
        return self.root / "wheel" / self.wheel_name

    def tool(self, name: str) -> Path:
        """The program ``llama-NAME``; the trainer's have no prefix, as in 2023."""
        return self.bin_dir / (name if self.kind == "trainer" else f"llama-{name}")


def save(toolchain: Toolchain, root: Path) -> None:
    """Write ``toolchain.json`` below ``root``, without the folder's own place."""
    noted = {key: value for key, value in asdict(toolchain).items() if key != "root"}
    files.write_json(root / "toolchain.json", noted)


def load(toolchain_id: str) -> Toolchain | None:
    """The Toolchain of that id, None when it is not there."""
    root = files.home_dir("toolchains") / toolchain_id
    noted = files.read_json(root / "toolchain.json")
    if not isinstance(noted, dict):
        return None
    try:
        lists = {
            key: tuple(noted.get(key, ())) for key in ("variants", "backends", "architectures", "options", "compilers")
        }
        return Toolchain(**{**noted, **lists, "root": root})
    except (KeyError, TypeError):
        return None


def list_ids() -> list[str]:
    """Ids of all finished Toolchains."""
    folders = files.home_dir("toolchains").glob("[!.]*/toolchain.json")
    return sorted(note.parent.name for note in folders if load(note.parent.name) and not note.parent.is_symlink())


def find(prefix: str) -> Toolchain:
    """The one Toolchain whose id begins with ``prefix``; UsageError when none or several do."""
    ids = [i for i in list_ids() if i.startswith(prefix)]
    if len(ids) == 1 and (found := load(ids[0])):
        return found
    raise UsageError(
        f"{'no' if not ids else 'more than one'} toolchain with the id {prefix}",
        evidence=f"there are: {', '.join(ids or list_ids()) or 'none'}",
        hint="name one of these, or run `./inv build`",
    )


def make_current(toolchain: Toolchain) -> None:
    """Point ``toolchains/current`` at it, or ``current-trainer`` at a trainer, in one atomic step."""
    link = _current_link(toolchain.kind)
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(toolchain.id)
    fresh.replace(link)


def current(kind: Kind = "llama") -> Toolchain | None:
    """The Toolchain of that kind in use, None before the first build."""
    link = _current_link(kind)
    return load(link.readlink().name) if link.is_symlink() else None


def _current_link(kind: Kind) -> Path:
    return files.home_dir("toolchains") / ("current" if kind == "llama" else f"current-{kind}")
