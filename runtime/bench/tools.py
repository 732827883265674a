"""The programs of the very build that llama_cpp runs on.

A wheel of ours names its Toolchain in its version (``0.3.36+cpu.g0c1e570.b6e326dd59da9`` is of Toolchain
``0c1e570-6e326dd59da9``). Its tool counts only if its libraries are byte for byte those that llama_cpp loads.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolchain.base import files

_LIBRARY: Final = re.compile(r"lib(llama|ggml).*\.(so|dylib)")  # those that compute; not mtmd, which reads pictures
_BUILT_HERE: Final = re.compile(r"\bg(?P<commit>[0-9a-f]{7,40})\.b(?P<digest>[0-9a-f]{12})$")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A program, and the number of libraries that it was found to share with llama_cpp, byte for byte."""

    path: Path
    same_libraries: int


def find_llama_bench(library_dir: Path) -> Tool | str:
    """The llama-bench on the libraries in ``library_dir``, or why there is none."""
    return find_tool("llama-bench", library_dir)


def find_tool(name: str, library_dir: Path) -> Tool | str:
    """The program ``name`` on the libraries in ``library_dir``, or why there is none."""
    try:
        version = importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        return "llama_cpp is not installed as a package, so nothing tells its Toolchain"
    toolchain = toolchain_of(version)
    if toolchain is None:
        return f"llama_cpp_python {version} comes from no Toolchain of ours: `./inv build` makes one with its tools"
    return matching_tool(files.foundry_home() / "toolchains" / toolchain, name, library_dir)


def toolchain_of(version: str) -> str | None:
    """The id of the Toolchain that a wheel of this version was packaged from."""
    found = _BUILT_HERE.search(version)
    return f"{found['commit']}-{found['digest']}" if found else None


def matching_tool(toolchain: Path, name: str, library_dir: Path) -> Tool | str:
    """The program ``name`` of a Toolchain's folder if its libraries are those in ``library_dir``, or why it is not."""
    program = toolchain / "bin" / name
    if not program.is_file():
        return f"there is no {program}: `./inv build` makes it"
    loaded = sorted(path for path in library_dir.iterdir() if _LIBRARY.fullmatch(path.name))
    if not loaded:
        return f"there are no libraries of llama.cpp in {library_dir}"
    for library in loaded:
        theirs = next((path for each in ("lib", "bin") if (path := toolchain / each / library.name).is_file()), None)
        if theirs is None:
            return f"{toolchain.name} has no {library.name}, which llama_cpp loads"
        if files.sha256_file(theirs) != files.sha256_file(library):
            return f"{library.name} of {toolchain.name} is another than llama_cpp loads from {library_dir}"
    return Tool(path=program, same_libraries=len(loaded))
