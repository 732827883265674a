"""Options and jobs: what a build is asked for on described machines and trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.described import GIB, machine
from tests.mini_llama import write_tree
from toolchain.base.errors import UsageError
from toolchain.base.machine import Machine
from toolchain.build.configure import toolchain_id
from toolchain.build.options import choose_options
from toolchain.build.pin import SourceTree
from toolchain.build.solve import choose_jobs


def tree(tmp_path: Path) -> SourceTree:
    root = write_tree(tmp_path / "tree")
    return SourceTree(pin=f"path:{root}", llama=root, bindings=None, digest="d", commit="0" * 40)


@pytest.mark.parametrize(
    ("described", "asked", "jobs", "why"),
    [
        (machine(), None, 8, "8 CPUs"),
        (machine(quota=2.5), None, 2, "quota 2.5"),
        (machine(quota=0.5), None, 1, "quota 0.5"),
        (machine(available_bytes=4 * GIB), None, 4, "memory is free"),
        (machine(available_bytes=GIB // 2), None, 1, "memory is free"),
        (machine(available_bytes=GIB), 6, 6, "asked for"),
    ],
)
def test_jobs_come_from_quota_and_memory(described: Machine, asked: int | None, jobs: int, why: str) -> None:
    chosen = choose_jobs(described, asked)
    assert chosen.count == jobs
    assert why in chosen.reason


def test_no_jobs_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        choose_jobs(machine(), 0)


def test_only_options_that_the_tree_has_are_set(tmp_path: Path) -> None:
    defines = dict(choose_options(tree(tmp_path), ["MINI_SHOUT=ON"]).defines)
    assert defines["MINI_SHOUT"] == "ON"
    assert "LLAMA_BUILD_UI" not in defines


def test_an_unknown_option_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        choose_options(tree(tmp_path), ["GGML_NATIV=OFF"])
    assert caught.value.hint == "did you mean GGML_NATIVE?"


@pytest.mark.parametrize("item", ["GGML_NATIVE", "=ON", "A B=C"])
def test_a_malformed_definition_is_refused(tmp_path: Path, item: str) -> None:
    with pytest.raises(UsageError, match="not a cmake definition"):
        choose_options(tree(tmp_path), [item])


def test_the_id_follows_what_the_build_depends_on_and_nothing_else(tmp_path: Path) -> None:
    source, gcc = tree(tmp_path), ("gcc 12",)
    native, portable = choose_options(source, []), choose_options(source, ["GGML_NATIVE=OFF"])
    base = toolchain_id(source, native, gcc, machine())
    assert toolchain_id(source, native, gcc, machine(quota=1.0, available_bytes=GIB)) == base
    different = {
        toolchain_id(source, portable, gcc, machine()),
        toolchain_id(source, native, ("gcc 13",), machine()),
        toolchain_id(source, native, gcc, machine(cpu_flags=frozenset({"avx2", "avx512f"}))),
        base,
    }
    assert len(different) == 4
    assert toolchain_id(source, portable, gcc, machine(cpu_flags=frozenset({"sse2"}))) == toolchain_id(
        source, portable, gcc, machine()
    )
