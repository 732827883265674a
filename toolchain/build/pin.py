"""What a source pin is, and what an unpacked source tree on disk is."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from toolchain.base import files
from toolchain.base.errors import UsageError

DEFAULT_PIN = "sdist:llama-cpp-python==0.3.36"


@dataclass(frozen=True, kw_only=True)
class SourcePin:
    """A parsed pin. ``name`` is a project, a git URL or a directory; ``ref`` a version or a git ref."""

    kind: Literal["sdist", "git", "path"]
    name: str
    ref: str = ""
    sha256: str | None = None

    def __str__(self) -> str:
        match self.kind:
            case "sdist":
                return f"sdist:{self.name}=={self.ref}"
            case "git":
                return f"git:{self.name}@{self.ref}"
            case "path":
                return f"path:{self.name}"


@dataclass(frozen=True, kw_only=True)
class SourceTree:
    """An unpacked source. ``digest`` identifies its content, ``commit`` is llama.cpp's own.

    ``bindings`` is the folder that holds the Python package ``llama_cpp``; None for a bare llama.cpp.
    """

    pin: str
    llama: Path
    bindings: Path | None
    digest: str
    commit: str

    @property
    def short_commit(self) -> str:
        """Seven digits, of llama.cpp's commit or, where that is not known, of the content's digest."""
        return self.commit.rpartition("-")[2][:7]


def parse_pin(text: str) -> SourcePin:
    """Parse ``sdist:NAME==VERSION[#sha256=HEX]``, ``git:URL@REF`` or ``path:DIR``; UsageError otherwise."""
    kind, _, rest = text.partition(":")
    match kind:
        case "sdist":
            if found := re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)(?:#sha256=([0-9a-f]{64}))?", rest):
                name, version, sha256 = found.groups()
                return SourcePin(kind="sdist", name=name, ref=version, sha256=sha256)
        case "git":
            url, _, ref = rest.rpartition("@")
            if url and ref and not ref.startswith("-") and not url.startswith("-"):
                return SourcePin(kind="git", name=_whole_path(url), ref=ref)
        case "path":
            if rest:
                return SourcePin(kind="path", name=os.path.abspath(files.expand(rest)))
    raise UsageError(
        f"not a source pin: {text}",
        hint=f"write {DEFAULT_PIN}, git:https://github.com/ggml-org/llama.cpp@master or path:../llama.cpp",
    )


def is_local(url: str) -> bool:
    """Whether a git URL means a repository on this machine."""
    return url.startswith(("file://", "/", "./", "../", "~"))


def _whole_path(url: str) -> str:
    return os.path.abspath(files.expand(url)) if is_local(url) and not url.startswith("file:") else url


def locate(root: Path, pin: str) -> tuple[Path, Path | None]:
    """(llama.cpp's folder, the bindings' folder or None) in a tree; UsageError when it is neither."""
    vendored = root / "vendor" / "llama.cpp"
    if (vendored / "CMakeLists.txt").is_file() and (root / "llama_cpp").is_dir():
        return vendored, root
    if (root / "CMakeLists.txt").is_file() and any((root / p / "llama.h").is_file() for p in ("include", "")):
        return root, None
    raise UsageError(
        f"{pin} is not a llama.cpp source tree",
        evidence=f"found neither llama.h beside a CMakeLists.txt nor vendor/llama.cpp in it: {_listing(root)}",
        hint="name the top folder of llama.cpp or of llama-cpp-python (with its submodules)",
    )


def _listing(root: Path) -> str:
    names = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") or "nothing"


def recorded(folder: Path) -> SourceTree | None:
    """The tree that ``folder/source.json`` describes; that file is written last."""
    match files.read_json(folder / "source.json"):
        case {
            "pin": str(pin),
            "llama": str(llama),
            "bindings": bindings,
            "digest": str(digest),
            "commit": str(commit),
        }:
            return SourceTree(
                pin=pin,
                llama=folder / llama,
                bindings=folder / str(bindings) if bindings is not None else None,
                digest=digest,
                commit=commit,
            )
    return None


def record(folder: Path, tree: SourceTree) -> None:
    noted = {
        **asdict(tree),
        "llama": str(tree.llama.relative_to(folder)),
        "bindings": str(tree.bindings.relative_to(folder)) if tree.bindings else None,
    }
    files.write_json(folder / "source.json", noted)


def ref_note(pin: SourcePin) -> Path:
    """Where it is recorded what a pin stood for: a git ref's commit, a version's SHA-256."""
    return files.home_dir("sources") / "refs" / f"{files.sha256_text(str(pin))[:32]}.json"
