"""Which build of llama.cpp is installed, told without loading it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from toolchain.base import files


def build_id() -> str:
    """The installed library, by its files' names, sizes and times; empty when llama_cpp is not installed.

    The folder is the one that the bindings load from: LLAMA_CPP_LIB_PATH, else ``lib`` in their package.
    """
    named = os.environ.get("LLAMA_CPP_LIB_PATH")
    spec = importlib.util.find_spec("llama_cpp")  # finds the package, and does not import it
    if not named and (spec is None or spec.origin is None):
        return ""
    folder = Path(named) if named else Path(str(spec and spec.origin)).parent / "lib"
    seen = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("lib*"))]
    return files.digest(seen)
