"""What is asked of cmake: the options of a build, checked against the source tree's own."""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import files
from toolchain.base.errors import UsageError
from toolchain.build.cuda import CudaChoice
from toolchain.build.pin import SourceTree
from toolchain.build.toolkit import Toolkit
from toolchain.build.toolkit_parts import wheel_folders
from toolchain.build.variants import OLD_NAMES, Variant, spelled

ORIGIN = "@loader_path" if platform.system() == "Darwin" else "$ORIGIN"

# What every build wants, where the tree at hand knows the option. Page and tests stay out; nothing may be
# downloaded while building (LLAMA_USE_PREBUILT_UI and LLAMA_CURL would), and fetching models is our part. NCCL
# would be linked with wherever it is found, and no wheel would say so.
TREE_DEFAULTS: Mapping[str, str] = {
    "GGML_CUDA_NCCL": "OFF",
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
    """The cache variables of one configuration. ``defines`` are part of the Toolchain's id; ``places`` only say
    where things lie on this machine. ``notes`` tell what was understood differently from how it was typed.
    """

    defines: tuple[tuple[str, str], ...]
    places: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        """Whether the code is compiled for this very CPU (llama.cpp's default)."""
        named = {"GGML_NATIVE", "LLAMA_NATIVE"} & dict(self.defines).keys()
        return not named or any(self.is_on(name) for name in named)

    @property
    def loads_backends(self) -> bool:
        """Whether backends are libraries of their own that are loaded at run time."""
        return self.is_on("GGML_BACKEND_DL")

    @property
    def builds_page(self) -> bool:
        """Whether llama-server gets the web page that npm builds."""
        return self.is_on("LLAMA_BUILD_UI")

    def is_on(self, name: str) -> bool:
        return is_true(dict(self.defines).get(name, "OFF"))

    def argv(self) -> tuple[str, ...]:
        return tuple(f"-D{name}={value}" for name, value in (*self.defines, *self.places))


def choose_options(
    tree: SourceTree,
    asked: Sequence[str],
    *,
    variants: Sequence[Variant] = (),
    cuda: CudaChoice | None = None,
    driver_stub: Path | None = None,
    defaults: Mapping[str, str] | None = None,
) -> BuildOptions:
    """The defaults, under the variants' options, under what was asked (``NAME=VALUE`` each).

    ``defaults`` None: those of every build, as far as the tree knows them. ``driver_stub`` is a folder with a
    libcuda.so for a tree that must link with one.

    Raises UsageError for an option that this tree does not have, under today's name or another year's, with the
    nearest one that it has.
    """
    known = tree_options(tree.llama)
    defines = default_defines(tree, known) if defaults is None else dict(defaults)
    chosen = {
        _in_tree(name, known, tree, f"{variant.flag}: "): (value, variant.flag)
        for variant in variants
        for name, value in variant.defines.items()
    }
    defines |= {name: value for name, (value, _) in chosen.items()}
    places: dict[str, str] = {}
    if cuda:
        defines |= _cuda_defines(cuda, known)
    if cuda and cuda.toolkit:
        places = _cuda_places(cuda, cuda.toolkit)
        if driver_stub:
            places["CUDA_cuda_driver_LIBRARY"] = str(driver_stub / "libcuda.so")
            places["CMAKE_BUILD_RPATH"] += f";{driver_stub / 'run'}"
    notes: list[str] = []
    for item in asked:
        typed, value = parse_define(item)
        name = _in_tree(typed, known, tree)
        if name != typed:
            notes.append(f"{typed} is {name} in {tree.pin}")
        if name in chosen and chosen[name][0].upper() != value.upper():
            raise UsageError(f"--define {item} contradicts {chosen[name][1]}", hint="leave one of them out")
        places.pop(name, None)
        defines[name] = value
    named = {name: value for name, value in defines.items() if name not in places}
    return BuildOptions(defines=tuple(sorted(named.items())), places=tuple(places.items()), notes=tuple(notes))


def is_true(value: str) -> bool:
    """Whether cmake takes ``value`` for true."""
    return value.upper() in ("ON", "1", "TRUE", "YES", "Y")


def default_defines(tree: SourceTree, known: frozenset[str]) -> dict[str, str]:
    """What every build wants, as far as the tree has it."""
    defines = {**CMAKE_DEFAULTS, **{name: value for name, value in TREE_DEFAULTS.items() if name in known}}
    if "LLAMA_BUILD_TOOLS" not in known and "LLAMA_BUILD_EXAMPLES" in known:
        defines["LLAMA_BUILD_EXAMPLES"] = "ON"  # where the tools were until 2025
    return {**defines, "LLAMA_BUILD_COMMIT": tree.short_commit, "LLAMA_BUILD_NUMBER": "0"}


def parse_define(item: str) -> tuple[str, str]:
    """``NAME=VALUE``, with or without -D; UsageError otherwise."""
    name, equals, value = item.removeprefix("-D").partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        raise UsageError(f"not a cmake definition: {item}", hint="write NAME=VALUE, as in GGML_NATIVE=OFF")
    return name, value


def _in_tree(name: str, known: frozenset[str], tree: SourceTree, asked_by: str = "") -> str:
    if name.startswith("CMAKE_"):
        return name
    if found := spelled(name, known):
        return found
    near = difflib.get_close_matches(name.upper(), [*known, *OLD_NAMES], n=1)
    raise UsageError(
        f"{asked_by}{tree.pin} has no option {name}",
        hint=f"did you mean {near[0]}?" if near else f"its options stand in {tree.llama}/CMakeLists.txt",
    )


def _cuda_defines(cuda: CudaChoice, known: frozenset[str]) -> dict[str, str]:
    """What the solver's choice means for cmake."""
    defines = {"CMAKE_CUDA_ARCHITECTURES": ";".join(cuda.archs)}
    if not cuda.vmm and "GGML_CUDA_NO_VMM" in known:
        defines["GGML_CUDA_NO_VMM"] = "ON"  # ggml's older pool is used
    return defines


def _cuda_places(cuda: CudaChoice, toolkit: Toolkit) -> dict[str, str]:
    """Where cmake, the linker and later the loader find the toolkit.

    cmake takes a toolkit's library folder for one that every loader knows, which is true of few. So its place is
    named; before it stands the folder of NVIDIA's wheels, which our wheel names as its needs, reached from
    llama_cpp/lib as torch's libraries reach it.
    """
    found = [f"{ORIGIN}/../../{folder}" for folder in wheel_folders(toolkit.release[0])]
    if toolkit.lib_dir.is_relative_to(sources := files.home_dir("sources")):  # so FOUNDRY_HOME can be moved
        found.append(f"{ORIGIN}/../../../sources/{toolkit.lib_dir.relative_to(sources)}")
    return {
        "CMAKE_BUILD_RPATH": str(toolkit.lib_dir),
        "CMAKE_CUDA_COMPILER": str(toolkit.nvcc),
        "CMAKE_CUDA_HOST_COMPILER": str(cuda.host.path),
        "CMAKE_INSTALL_RPATH": ";".join((CMAKE_DEFAULTS["CMAKE_INSTALL_RPATH"], *found, str(toolkit.lib_dir))),
        "CUDAToolkit_ROOT": str(toolkit.root),
    }


def tree_options(llama: Path) -> frozenset[str]:
    """Names of the options and cache entries that llama.cpp and ggml declare."""
    names: set[str] = set()
    for listing in (llama / "CMakeLists.txt", llama / "ggml" / "CMakeLists.txt"):
        if listing.is_file():
            text = listing.read_text(errors="replace")
            names.update(re.findall(r"^\s*option\(\s*(\w+)", text, re.MULTILINE))
            names.update(re.findall(r"^\s*set\(\s*(\w+)[^)]*\bCACHE\b", text, re.MULTILINE))
    return frozenset(names)
