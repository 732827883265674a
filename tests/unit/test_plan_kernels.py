"""Cache types with a fast kernel, by backend and head; which build is installed, by its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.memory import kernels
from runtime.memory.kernels import CUDA_DEFAULT_PAIRS, Backend, Build, cuda_pairs, installed_build, is_fast
from runtime.memory.shape import shape_of
from tests.described_models import known


@pytest.mark.parametrize(
    ("backend", "model", "type_k", "type_v", "fast"),
    [
        ("CPU", "llama-8b", "f16", "f16", True),
        ("CPU", "llama-8b", "q8_0", "q8_0", False),  # no tiled kernel: prompts go row by row
        ("CPU", "llama-8b", "bf16", "bf16", False),
        ("CUDA", "llama-8b", "q8_0", "q8_0", True),
        ("CUDA", "llama-8b", "q4_0", "q4_0", True),
        ("CUDA", "llama-8b", "q5_1", "q5_1", False),  # not among the pairs compiled by default
        ("CUDA", "llama-8b", "q8_0", "f16", False),
        ("CUDA", "gemma3-4b", "q8_0", "q8_0", True),  # heads of 256
        ("CUDA", "head-80", "f16", "f16", True),
        ("CUDA", "head-80", "q8_0", "q8_0", False),  # no vector kernel: 80 is no multiple of 64
        ("CUDA", "deepseek-v2-lite", "f16", "f16", True),
        ("CUDA", "deepseek-v2-lite", "q8_0", "q8_0", False),  # 576 wide
        ("CUDA", "deepseek-v2-lite", "q8_0", "f16", False),  # the library refuses it
        ("Metal", "llama-8b", "q8_0", "q8_0", True),
        ("Metal", "llama-8b", "q8_0", "f16", False),
        ("Vulkan", "llama-8b", "q8_0", "f16", True),
        ("other", "llama-8b", "q8_0", "q8_0", False),
    ],
)
def test_fast_types_by_backend_and_head(backend: Backend, model: str, type_k: str, type_v: str, fast: bool) -> None:
    build = Build(backends=frozenset({"CPU", backend}))
    assert is_fast(backend, build, shape_of([known(model)]), type_k, type_v) is fast


def test_pairs_follow_the_options_of_the_build() -> None:
    assert cuda_pairs(["-DGGML_CUDA=ON"]) == CUDA_DEFAULT_PAIRS
    assert cuda_pairs(["-DGGML_CUDA_FA_QUANTS=q8_0-q5_1,q4_0-q4_0"]) == {
        ("f16", "f16"),
        ("q8_0", "q5_1"),
        ("q4_0", "q4_0"),
    }
    assert ("q5_0", "bf16") in cuda_pairs(["-DGGML_CUDA_FA_ALL_QUANTS=ON"])
    assert len(cuda_pairs(["-DGGML_CUDA_FA_QUANTS=all"])) == 49


def test_a_build_is_known_by_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    for name, backend in (("libggml-cpu.so", None), ("libggml-vulkan.so", "Vulkan"), ("libggml-cuda.so", "CUDA")):
        (tmp_path / name).touch()
        kernels.installed_build.cache_clear()
        assert installed_build().gpu_backend == backend
    kernels.installed_build.cache_clear()
