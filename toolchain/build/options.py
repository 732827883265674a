"""What is asked of cmake: the options of a build, checked against the source tree's own."""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.base.errors import UsageError
from toolchain.build.pin import SourceTree

ORIGIN = "@loader_path" if platform.system() == "Darwin" else "$ORIGIN"

# What every build wants, where the tree at hand knows the option. Page and tests stay out; nothing may be
# downloaded while building (LLAMA_USE_PREBUILT_UI and LLAMA_CURL would), and fetching models is our part.
TREE_DEFAULTS: Mapping[str, str] = {
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}

# cmake's own variables. Libraries without version links are single files, as a wheel needs them; the
# relative RPATH lets programs and libraries find each other wherever the folder lies. Git is kept out: the
# tree is no repository, and git would report the commit of whichever one FOUNDRY_HOME lies in.
CMAKE_DEFAULTS: Mapping[str, str] = {
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_INSTALL_LIBDIR": "lib",
    "CMAKE_INSTALL_RPATH": f"{ORIGIN};{ORIGIN}/../lib",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "GIT_EXE": "OFF",
    "GIT_EXECUTABLE": "OFF",
}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The cache variables of one configuration, sorted; part of the Toolchain's id."""

    defines: tuple[tuple[str, str], ...]

    @property
    def native(self) -> bool:
        """Whether the code is compiled for this very CPU (llama.cpp's default)."""
        return dict(self.defines).get("GGML_NATIVE", "ON").upper() not in ("OFF", "0", "FALSE", "NO")

    def argv(self) -> tuple[str, ...]:
        return tuple(f"-D{name}={value}" for name, value in self.defines)


def choose_options(tree: SourceTree, asked: Sequence[str]) -> BuildOptions:
    """The defaults that the tree knows, under what was asked (``NAME=VALUE`` each).

    Raises UsageError for an option that this tree does not have, with the nearest one that it has.
    """
    known = tree_options(tree.llama)
    defines = {**CMAKE_DEFAULTS, **{name: value for name, value in TREE_DEFAULTS.items() if name in known}}
    defines |= {"LLAMA_BUILD_COMMIT": tree.short_commit, "LLAMA_BUILD_NUMBER": "0"}
    for item in asked:
        name, equals, value = item.removeprefix("-D").partition("=")
        if not equals or not re.fullmatch(r"\w+", name):
            raise UsageError(f"not a cmake definition: {item}", hint="write NAME=VALUE, as in GGML_NATIVE=OFF")
        if name not in known and not name.startswith("CMAKE_"):
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"{tree.pin} has no option {name}",
                hint=f"did you mean {near[0]}?" if near else f"its options stand in {tree.llama}/CMakeLists.txt",
            )
        defines[name] = value
    return BuildOptions(defines=tuple(sorted(defines.items())))


def tree_options(llama: Path) -> frozenset[str]:
    """Names of the options and cache entries that llama.cpp and ggml declare."""
    names: set[str] = set()
    for listing in (llama / "CMakeLists.txt", llama / "ggml" / "CMakeLists.txt"):
        if listing.is_file():
            text = listing.read_text(errors="replace")
            names.update(re.findall(r"^\s*option\(\s*(\w+)", text, re.MULTILINE))
            names.update(re.findall(r"^\s*set\(\s*(\w+)[^)]*\bCACHE\b", text, re.MULTILINE))
    return frozenset(names)
