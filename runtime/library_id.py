"""Which build of llama.cpp is installed, told without loading it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from toolchain.base import files


def library_dir() -> Path | None:
    """The folder that the bindings load from: LLAMA_CPP_LIB_PATH, else ``lib`` in their package; None without them."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")  # finds the package, and does not import it
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"


def build_id() -> str:
    """The installed library, by its files' names, sizes and times; empty when llama_cpp is not installed."""
    folder = library_dir()
    if folder is None:
        return ""
    seen = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("lib*"))]
    return files.digest(seen)
