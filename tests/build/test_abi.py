"""The ABI proof on the real build: its bindings, its headers, and faults planted in copies of both."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

import pytest

from toolchain.base.abi import Layout, compare
from toolchain.base.errors import ArtifactError
from toolchain.base.machine import find_compiler
from toolchain.build.abi import compiled_layout, declared_by, prove_abi
from toolchain.build.toolchain import Toolchain

UPSTREAM: tuple[str, ...] = ()
"""Faults that are left in the packaged bindings of the default pin, once those that are known are mended."""


@pytest.fixture(scope="module")
def package(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the build, unpacked."""
    folder = tmp_path_factory.mktemp("package")
    with zipfile.ZipFile(toolchain.wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def declared(package: Path) -> Layout:
    return declared_by(package)


def edited(folder: Path, into: Path, name: str, old: str, new: str) -> Path:
    """A copy of ``folder`` at ``into`` where the one match of the pattern ``old`` in file ``name`` is ``new``."""
    shutil.copytree(folder, into)
    text, count = re.subn(old, new, (into / name).read_text())
    assert count == 1, f"{old} stands {count} times in {name}"
    (into / name).write_text(text)
    return into


def test_the_bindings_of_the_default_pin_match_its_headers(toolchain: Toolchain, declared: Layout) -> None:
    compiled = compiled_layout(declared, include_dirs=[toolchain.root / "include"], compiler=find_compiler("c"))
    assert compare(declared, compiled) == UPSTREAM
    assert {"llama_model_params", "llama_context_params", "llama_batch", "mtmd_context_params"} <= set(compiled.structs)
    assert len(compiled.constants) > 150
    assert {re.sub(r"(?<=PRE_TYPE_)\w+", "*", name) for name in compiled.unchecked} == {
        "LLAMA_MAX_DEVICES",  # asked of the library at import
        "LLAMA_VOCAB_PRE_TYPE_*",  # an enum of a private header
    }


@pytest.mark.parametrize(
    ("header", "old", "new", "fault"),
    [
        pytest.param(
            "llama.h",
            r"(struct llama_batch \{\s+int32_t n_tokens;)",
            r"\1 int32_t n_planted;",
            "llama_batch.n_planted: in C (4 bytes at offset 4), not in the bindings",
            id="inserted in the middle, into padding",
        ),
        pytest.param(
            "llama.h",
            r"(struct llama_context_params \{\s+uint32_t n_ctx;[^\n]*)",
            r"\1\n uint64_t n_planted;",
            "llama_context_params.n_planted: in C (8 bytes at offset 8), not in the bindings",
            id="inserted in the middle, all others moved",
        ),
        pytest.param(
            "mtmd.h",
            r"(void \* progress_callback_user_data;)",
            r"\1 bool planted;",
            "mtmd_context_params.planted: in C (1 bytes at offset {end}), not in the bindings",
            id="inserted at the end",
        ),
        pytest.param(
            "llama.h",
            r"int32_t( +)n_threads;([^\n]*\n\s+)int32_t( +)n_threads_batch;",
            r"int32_t\1n_threads_batch;\2int32_t\3n_threads;",
            "llama_context_params: the order is n_threads, n_threads_batch in the bindings, "
            "n_threads_batch, n_threads in C",
            id="two of one size swapped",
        ),
        pytest.param(
            "llama.h",
            r"LLAMA_POOLING_TYPE_MEAN = 1",
            "LLAMA_POOLING_TYPE_MEAN = 7",
            "LLAMA_POOLING_TYPE_MEAN: 1 in the bindings, 7 in C",
            id="another enum value",
        ),
        pytest.param(
            "llama.h",
            r"LLAMA_FTYPE_MOSTLY_Q4_0 +=[^\n]*",
            "",
            "LLAMA_FTYPE_MOSTLY_Q4_0: in the bindings (2), not in C",
            id="enum constant removed",
        ),
        pytest.param(
            "llama.h",
            r"(struct llama_chat_message \{\s+const char \* role;\s+const char \*) content;",
            r"\1 text;",
            "llama_chat_message.content: called text in C (8 bytes at offset 8)",
            id="renamed",
        ),
    ],
)
def test_a_fault_planted_in_the_headers_is_refused_by_name(
    toolchain: Toolchain, declared: Layout, tmp_path: Path, header: str, old: str, new: str, fault: str
) -> None:
    include = edited(toolchain.root / "include", tmp_path / "include", header, old, new)
    compiled = compiled_layout(declared, include_dirs=[include], compiler=find_compiler("c"))
    fault = fault.format(end=declared.structs["mtmd_context_params"].size)
    assert [found for found in compare(declared, compiled) if found not in UPSTREAM] == [fault]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param(
            r'\("n_threads", ctypes.c_int32\),(\s+)\("n_threads_batch", ctypes.c_int32\),',
            r'("n_threads_batch", ctypes.c_int32),\1("n_threads", ctypes.c_int32),',
            "llama_context_params: the order is n_threads_batch, n_threads in the bindings, "
            "n_threads, n_threads_batch in C",
            id="two of one size swapped",
        ),
        pytest.param(
            r'(\("n_tokens", ctypes.c_int32\),)',
            r'\1 ("n_planted", ctypes.c_int64),',
            "llama_batch.n_planted: in the bindings (8 bytes at offset 8), not in C",
            id="inserted",
        ),
        pytest.param(
            r"\nLLAMA_POOLING_TYPE_CLS = 2",
            r"\nLLAMA_POOLING_TYPE_CLS = 3",
            "LLAMA_POOLING_TYPE_CLS: 3 in the bindings, 2 in C",
            id="another enum value",
        ),
    ],
)
def test_a_fault_planted_in_the_bindings_ends_the_proof(
    toolchain: Toolchain, package: Path, tmp_path: Path, old: str, new: str, fault: str
) -> None:
    altered = edited(package, tmp_path / "package", "llama_cpp/llama_cpp.py", old, new)
    with pytest.raises(ArtifactError) as caught:
        prove_abi(path=altered, include_dirs=[toolchain.root / "include"], compiler=find_compiler("c"))
    assert caught.value.exit_code == 6
    assert [line for line in caught.value.evidence.splitlines() if line not in UPSTREAM] == [fault]


def test_bindings_without_their_library_cannot_be_read(package: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(package, bare, ignore=shutil.ignore_patterns("lib"))
    with pytest.raises(ArtifactError, match="cannot be imported") as caught:
        declared_by(bare)
    assert "llama" in caught.value.evidence
