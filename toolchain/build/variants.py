"""The variants of a build beside plain CPU: one row each, with its options, its needs and what must prove it."""

from __future__ import annotations

import difflib
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.base import command, files
from toolchain.base.errors import CommandError, MissingError, UsageError
from toolchain.base.machine import Compiler


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something that must be on the machine: a program on PATH, or a header that the compiler finds and, where that
    says that it is new enough, the ``macro`` that it defines.
    """

    install: str
    program: str = ""
    header: str = ""
    macro: str = ""
    pkg_config: str = ""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row. ``defines`` carry today's option names; ``backend`` is what ggml must register afterwards; ``tag``
    goes into the wheel's version.
    """

    name: str
    flag: str
    about: str
    defines: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    backend: str = ""
    tag: str = ""
    excludes: tuple[str, ...] = ()


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="cuda",
            flag="--cuda",
            about="NVIDIA GPUs; the rest of its options come from the solver (cuda.py)",
            defines={"GGML_CUDA": "ON"},
            backend="CUDA",
            excludes=("cpu",),
        ),
        Variant(name="cpu", flag="--cpu", about="no accelerator (the default)"),
        Variant(
            name="openblas",
            flag="--blas openblas",
            about="OpenBLAS for large prompt batches",
            defines={"GGML_BLAS": "ON", "GGML_BLAS_VENDOR": "OpenBLAS"},
            needs=(Need(header="cblas.h", pkg_config="openblas", install="apt-get install libopenblas-dev"),),
            backend="BLAS",
            tag="openblas",
            excludes=("blis",),
        ),
        Variant(
            name="blis",
            flag="--blas blis",
            about="BLIS, AMD's and FLAME's BLAS (cmake knows it as FLAME)",
            defines={"GGML_BLAS": "ON", "GGML_BLAS_VENDOR": "FLAME"},
            needs=(Need(header="blis.h", pkg_config="blis", install="apt-get install libblis-dev"),),
            backend="BLAS",
            tag="blis",
        ),
        Variant(
            name="vulkan",
            flag="--vulkan",
            about="GPUs of any maker through Vulkan",
            defines={"GGML_VULKAN": "ON"},
            needs=(
                Need(program="glslc", install="apt-get install glslc (or the Vulkan SDK)"),
                Need(header="vulkan/vulkan.hpp", install="apt-get install libvulkan-dev (or the Vulkan SDK)"),
                Need(
                    header="vulkan/vulkan.h",
                    macro="VK_EXT_layer_settings",
                    install="install Vulkan headers of 1.3.272 or newer (the Vulkan SDK, or Debian 13's)",
                ),
                Need(header="spirv/unified1/spirv.hpp", install="apt-get install spirv-headers"),
            ),
            backend="Vulkan",
            tag="vulkan",
        ),
        Variant(
            name="rpc",
            flag="--rpc",
            about="layers on other machines, and the server for it",
            defines={"GGML_RPC": "ON"},
            backend="RPC",
            tag="rpc",
        ),
        Variant(
            name="native",
            flag="--native",
            about="code for this very CPU (the default)",
            defines={"GGML_NATIVE": "ON"},
            excludes=("portable",),
        ),
        Variant(
            name="portable",
            flag="--portable",
            about="all CPU variants, the best one loaded at run time",
            defines={"GGML_NATIVE": "OFF", "GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON"},
            tag="portable",
        ),
        Variant(
            name="ui",
            flag="--ui",
            about="llama-server with its web page, built by npm from the same sources",
            defines={"LLAMA_BUILD_UI": "ON"},
            needs=(
                Need(program="node", install="apt-get install nodejs"),
                Need(program="npm", install="apt-get install npm"),
            ),
        ),
        Variant(
            name="debug",
            flag="--debug",
            about="assertions and debug information, not optimized",
            defines={"CMAKE_BUILD_TYPE": "Debug"},
            tag="debug",
        ),
    )
}

BLAS = ("openblas", "blis")

OLD_NAMES: Mapping[str, str] = {
    "CUBLAS": "GGML_CUDA",
    "GGML_CUBLAS": "GGML_CUDA",
    "LLAMA_CUBLAS": "GGML_CUDA",
    "LLAMA_CUDA": "GGML_CUDA",
    "LLAMA_HIPBLAS": "GGML_HIP",
    "GGML_HIPBLAS": "GGML_HIP",
    "LLAMA_OPENBLAS": "GGML_BLAS",
    "LLAMA_BUILD_WEBUI": "LLAMA_BUILD_UI",
}
"""Names that options had in other years, as notebooks still write them, by what they are called today. All other
options only changed their prefix, LLAMA_ to GGML_, in June 2024 (llama.cpp pull request 8006)."""


def choose_variants(names: Iterable[str]) -> tuple[Variant, ...]:
    """The rows of ``names``; UsageError for an unknown one, or for two that exclude each other."""
    chosen: dict[str, Variant] = {}
    for name in names:
        if name.lower() in ("cublas", "cuda"):
            chosen["cuda"] = VARIANTS["cuda"]
        elif name.lower() in VARIANTS:
            chosen[name.lower()] = VARIANTS[name.lower()]
        else:
            near = difflib.get_close_matches(name.lower(), [*VARIANTS, "cublas"], n=1)
            raise UsageError(
                f"no build variant {name}",
                hint=f"did you mean {near[0]}?" if near else f"there are: {', '.join(VARIANTS)}",
            )
    for variant in chosen.values():
        for other in variant.excludes:
            if other in chosen:
                raise UsageError(
                    f"{variant.flag} and {VARIANTS[other].flag} exclude each other",
                    hint="choose one; each build lies beside the others, and `./inv use ID` switches",
                )
    return tuple(chosen.values())


def spelled(name: str, known: frozenset[str]) -> str | None:
    """How the tree that has the options ``known`` calls ``name``, be it today's, an old or a new name of it."""
    today = OLD_NAMES.get(name.upper(), name)
    others = [old for old, new in OLD_NAMES.items() if new == today]
    swapped = re.sub(r"^(GGML|LLAMA)_", lambda m: "LLAMA_" if m[1] == "GGML" else "GGML_", today)
    return next((each for each in (name, today, swapped, *others) if each in known), None)


def require_needs(variants: Sequence[Variant], compiler: Compiler) -> None:
    """Raise MissingError, with what to install, for the first thing that a chosen variant lacks here."""
    for variant in variants:
        for need in variant.needs:
            if not _is_there(need, compiler):
                raise MissingError(
                    f"{variant.flag} needs {need.program or need.header}{' with ' * bool(need.macro)}{need.macro}, "
                    "which is not on this machine",
                    evidence="looked on PATH" if need.program else f"{compiler.path} does not find it",
                    hint=need.install,
                )


def _is_there(need: Need, compiler: Compiler) -> bool:
    if need.program:
        return shutil.which(need.program) is not None
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="need-") as scratch:
        source = Path(scratch) / "need.cpp"
        source.write_text(
            f"#include <{need.header}>\n#if {'!defined ' + need.macro if need.macro else 0}\n#error\n#endif\n"
        )
        if _succeeds([compiler.path, "-fsyntax-only", source]):
            return True
    return bool(need.pkg_config and shutil.which("pkg-config")) and _succeeds(
        ["pkg-config", "--exists", need.pkg_config]
    )


def _succeeds(argv: Sequence[str | Path]) -> bool:
    try:
        command.capture(argv, what="looking for a header")
    except CommandError:
        return False
    return True
