"""The table of build variants, held against the real options of trees of several years."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.described import machine
from toolchain.base.errors import MissingError, UsageError
from toolchain.base.machine import Compiler, find_compiler
from toolchain.build.cuda import choose_cuda
from toolchain.build.options import choose_options
from toolchain.build.pin import SourceTree
from toolchain.build.toolkit import Toolkit
from toolchain.build.variants import VARIANTS, Need, choose_variants, require_needs, spelled
from toolchain.build.verbs import request

TODAY = ("GGML_CUDA", "GGML_CUDA_NO_VMM", "GGML_BLAS", "GGML_BLAS_VENDOR", "GGML_NATIVE", "GGML_RPC", "GGML_VULKAN",
         "GGML_BACKEND_DL", "GGML_CPU_ALL_VARIANTS", "LLAMA_BUILD_UI", "LLAMA_BUILD_TOOLS")  # fmt: skip
SPRING_2024 = (
    "LLAMA_CUBLAS",
    "LLAMA_BLAS",
    "LLAMA_BLAS_VENDOR",
    "LLAMA_NATIVE",
    "LLAMA_VULKAN",
    "LLAMA_BUILD_EXAMPLES",
)
SUMMER_2024 = ("LLAMA_CUDA", "LLAMA_NATIVE", "LLAMA_RPC")


def tree(tmp_path: Path, options: Sequence[str]) -> SourceTree:
    root = tmp_path / "tree"
    root.mkdir()
    lines = [f'option({name} "x" OFF)' for name in options if not name.endswith("VENDOR")]
    lines += [f'set({name} "Generic" CACHE STRING "x")' for name in options if name.endswith("VENDOR")]
    (root / "CMakeLists.txt").write_text("\n".join(lines))
    return SourceTree(pin="path:tree", llama=root, bindings=None, digest="d", commit="0" * 40)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("cpu", "debug")])
def test_every_variant_names_options_of_the_pinned_tree(tmp_path: Path, name: str) -> None:
    options = choose_options(tree(tmp_path, TODAY), [], variants=choose_variants([name]))
    assert VARIANTS[name].defines.items() <= dict(options.defines).items()


@pytest.mark.parametrize(
    ("options", "name", "wanted"),
    [
        (SPRING_2024, "cuda", {"LLAMA_CUBLAS": "ON"}),
        (SUMMER_2024, "cuda", {"LLAMA_CUDA": "ON"}),
        (SPRING_2024, "openblas", {"LLAMA_BLAS": "ON", "LLAMA_BLAS_VENDOR": "OpenBLAS"}),
        (SPRING_2024, "native", {"LLAMA_NATIVE": "ON"}),
        (SUMMER_2024, "rpc", {"LLAMA_RPC": "ON"}),
    ],
)
def test_options_are_spelled_as_the_tree_in_hand_spells_them(
    tmp_path: Path, options: Sequence[str], name: str, wanted: dict[str, str]
) -> None:
    chosen = choose_options(tree(tmp_path, options), [], variants=choose_variants([name]))
    assert wanted.items() <= dict(chosen.defines).items()


def test_a_variant_that_the_tree_does_not_have_is_refused_by_its_flag(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--portable: path:tree has no option GGML_BACKEND_DL"):
        choose_options(tree(tmp_path, SPRING_2024), [], variants=choose_variants(["portable"]))


@pytest.mark.parametrize("typed", ["LLAMA_CUBLAS=ON", "LLAMA_CUDA=1", "GGML_CUDA=ON", "-DLLAMA_CUBLAS=on", "cuBLAS=ON"])
def test_the_cuda_option_of_any_year_asks_for_cuda(typed: str) -> None:
    asked = request(defines=[typed, "GGML_LTO=ON"])
    assert (asked.variants, asked.defines) == (("cuda",), ("GGML_LTO=ON",))


@pytest.mark.parametrize(
    ("typed", "becomes"),
    [("LLAMA_NATIVE=OFF", "GGML_NATIVE"), ("LLAMA_BLAS=ON", "GGML_BLAS"), ("GGML_RPC=ON", "GGML_RPC")],
)
def test_an_old_name_is_understood_and_said(tmp_path: Path, typed: str, becomes: str) -> None:
    chosen = choose_options(tree(tmp_path, TODAY), [typed])
    assert dict(chosen.defines)[becomes] == typed.partition("=")[2]
    assert bool(chosen.notes) == (typed.partition("=")[0] != becomes)


@pytest.mark.parametrize(("typed", "meant"), [("LLAMA_CUBLASS", "LLAMA_CUBLAS"), ("GGML_NATVE", "GGML_NATIVE")])
def test_a_slip_in_an_option_of_any_year_is_answered(tmp_path: Path, typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_options(tree(tmp_path, TODAY), [f"{typed}=ON"])
    assert caught.value.hint == f"did you mean {meant}?"


def test_spelled_knows_what_is_not_there() -> None:
    assert spelled("GGML_SYCL", frozenset(TODAY)) is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["native", "portable"], "--portable and --native|--native and --portable"),
        (["cpu", "cuda"], "exclude"),
        (["openblas", "blis"], "exclude"),
        (["opnblas"], "no build variant opnblas"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(names: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_variants(names)


def test_a_slip_is_answered_with_what_was_meant() -> None:
    with pytest.raises(UsageError) as caught:
        choose_variants(["opnblas"])
    assert caught.value.hint == "did you mean openblas?"


@pytest.mark.parametrize(
    ("need", "there"),
    [
        (Need(program="sh", install="x"), True),
        (Need(program="no-such-program", install="apt-get install it"), False),
        (Need(header="stdio.h", install="x"), True),
        (Need(header="vector.hpp.none", install="apt-get install it"), False),
        (Need(header="limits.h", macro="INT_MAX", install="x"), True),
        (Need(header="limits.h", macro="TOO_NEW", install="apt-get install it"), False),
    ],
)
def test_a_missing_need_says_what_to_install(need: Need, there: bool) -> None:
    row = dataclasses.replace(VARIANTS["rpc"], needs=(need,))
    if there:
        require_needs([row], find_compiler("c++"))
        return
    with pytest.raises(MissingError, match="--rpc needs") as caught:
        require_needs([row], find_compiler("c++"))
    assert caught.value.hint == "apt-get install it"


def test_cuda_brings_its_architectures_paths_and_a_way_around_a_missing_driver_library(tmp_path: Path) -> None:
    toolkit = Toolkit(
        root=Path("/opt/cuda"), version="13.0.88", found_by="PATH", archs=frozenset({"86", "90"}), gcc_max=15,
        clang_max=20, driver_stub=False,
    )  # fmt: skip
    gcc = Compiler(path=Path("/usr/bin/g++"), version="g++ (GCC) 12.2.0")
    choice = choose_cuda(toolkits=[toolkit], compilers=[gcc], machine=machine(), asked=("86,90",))
    options = choose_options(tree(tmp_path, TODAY), [], variants=choose_variants(["cuda"]), cuda=choice)
    defines = dict(options.defines)
    assert defines["CMAKE_CUDA_ARCHITECTURES"] == "86;90"
    assert defines["GGML_CUDA_NO_VMM"] == "ON"
    assert "/nvidia/cu13/lib" in dict(options.places)["CMAKE_INSTALL_RPATH"]
    assert not [value for value in defines.values() if "/opt/cuda" in value]  # places are no part of the id
    assert dict(options.places)["CMAKE_CUDA_COMPILER"] == "/opt/cuda/bin/nvcc"
