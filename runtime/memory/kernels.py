"""Which cache types the installed build has a fast attention kernel for, read off its sources (llama.cpp 0c1e570).

* CPU (ggml-cpu/ops.cpp, ggml_compute_forward_flash_attn_ext_f16): the tiled kernel for prompts and the split one for
  long caches take f32 and f16 of one type; others go row by row (q8_0 at a depth of 2,048 read prompts at 0.2 of f16's
  speed where it was measured).
* CUDA (ggml-cuda/fattn.cu): quantized caches are fast where the vector kernel for that pair was compiled
  (GGML_CUDA_FA_QUANTS, by default f16, bf16, q8_0 and q4_0 with themselves) for heads of 64, 128 or 256; elsewhere the
  whole cache is unpacked to f16 for each token.
* Metal (ggml-metal-device.m): equal types, heads of a list. Vulkan (ggml-vulkan.cpp): any pair, heads of whole eights.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, TypeAlias

from runtime.memory.shape import ModelShape
from toolchain.base import files

Backend: TypeAlias = Literal["CPU", "CUDA", "Metal", "Vulkan", "other"]
Pairs: TypeAlias = frozenset[tuple[str, str]]

_LIBRARIES: Final[tuple[tuple[str, Backend], ...]] = (
    ("ggml-cuda", "CUDA"),
    ("ggml-hip", "CUDA"),
    ("ggml-metal", "Metal"),
    ("ggml-vulkan", "Vulkan"),
    ("ggml-sycl", "other"),
    ("ggml-opencl", "other"),
    ("ggml-cann", "other"),
)
_CUDA_TYPES: Final = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16", "f16")
CUDA_DEFAULT_PAIRS: Final[Pairs] = frozenset((kind, kind) for kind in ("f16", "bf16", "q8_0", "q4_0"))
_CUDA_VECTOR_HEADS: Final = frozenset({64, 128, 256})
_CUDA_HEADS: Final = frozenset({40, 64, 72, 80, 96, 112, 128, 256, 512})  # keys and values alike
_CUDA_PAIRED_HEADS: Final = frozenset({(192, 128), (320, 256), (576, 512)})
_METAL_HEADS: Final = frozenset({32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576})
_METAL_TYPES: Final = frozenset({"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"})
_UNQUANTIZED: Final = frozenset({"f32", "f16", "bf16"})


@dataclass(frozen=True, kw_only=True)
class Build:
    """The installed library: what it computes on, and the pairs of cache types that its CUDA kernels were made for."""

    backends: frozenset[Backend]
    cuda_pairs: Pairs = CUDA_DEFAULT_PAIRS

    @property
    def gpu_backend(self) -> Backend | None:
        """What drives GPUs in this build, None in one for the CPU alone."""
        return next((name for name in ("CUDA", "Metal", "Vulkan", "other") if name in self.backends), None)


@lru_cache(maxsize=1)
def installed_build() -> Build:
    """Read from the names of the library's files and the options it was built with; nothing is loaded."""
    folder = _library_folder()
    names = [path.name for path in folder.glob("*ggml-*")] if folder else []
    found: set[Backend] = {backend for part, backend in _LIBRARIES if any(part in name for name in names)}
    return Build(backends=frozenset({"CPU", *found}), cuda_pairs=_compiled_pairs())


def is_fast(backend: Backend, build: Build, shape: ModelShape, type_k: str, type_v: str) -> bool:
    """Whether ``backend`` has a fast kernel for every layer's cache in these types."""
    heads = {(layer.head_k, layer.head_v) for layer in shape.layers if layer.owns_kv}
    if shape.key_only and type_k != type_v:
        return False  # the library refuses it (llama_init_from_model)
    return all(_fast_head(backend, build, k, v, type_k, type_v) for k, v in heads)


def runs_flash_attention(backend: Backend, shape: ModelShape) -> bool:
    """Whether ``auto`` ends in flash attention with an f16 cache; without it, a micro-batch's scores take memory."""
    if shape.architecture == "grok":
        return False  # "flash_attn is not compatible with Grok" (llama-context.cpp)
    build = Build(backends=frozenset({backend}))
    return backend == "other" or is_fast(backend, build, shape, "f16", "f16")


def _fast_head(backend: Backend, build: Build, head_k: int, head_v: int, type_k: str, type_v: str) -> bool:
    same, quantized = type_k == type_v, not {type_k, type_v} <= _UNQUANTIZED
    if quantized and (head_k % 32 or head_v % 32):
        return False  # the library refuses rows that are no whole blocks
    match backend:
        case "CPU":
            fast = same and type_k in ("f16", "f32")
        case "CUDA" if quantized:
            fast = (type_k, type_v) in build.cuda_pairs and head_k == head_v and head_k in _CUDA_VECTOR_HEADS
        case "CUDA":
            known = head_k in _CUDA_HEADS if head_k == head_v else (head_k, head_v) in _CUDA_PAIRED_HEADS
            fast = known and same
        case "Metal":
            fast = same and type_k in _METAL_TYPES and head_k in _METAL_HEADS and head_k >= head_v
        case "Vulkan":
            fast = head_k % 8 == 0 and head_v % 8 == 0 and (type_k == "bf16") == (type_v == "bf16")
        case _:
            fast = type_k == type_v == "f16"
    return fast


def _library_folder() -> Path | None:
    """Where the bindings load from: LLAMA_CPP_LIB_PATH, else ``lib`` in their package, which is not imported."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec is not None and spec.origin else None


def _compiled_pairs() -> Pairs:
    """From the options of the Toolchain that the installed wheel says it is; the defaults for a foreign build."""
    spec = importlib.util.find_spec("llama_cpp")
    beside = Path(spec.origin).parents[1] if spec is not None and spec.origin else None
    named = beside.glob("llama_cpp_python-*.dist-info") if beside else ()  # importlib.metadata costs 10 ms to import
    identity = next((found for path in named if (found := re.search(r"\.b([0-9a-f]+)\.dist-info$", path.name))), None)
    if identity is None:
        return CUDA_DEFAULT_PAIRS
    for note in (files.foundry_home() / "toolchains").glob(f"*-{identity[1]}/toolchain.json"):
        match files.read_json(note):
            case {"options": [*options]}:
                return cuda_pairs([str(option) for option in options])
    return CUDA_DEFAULT_PAIRS


def cuda_pairs(options: list[str]) -> Pairs:
    """The pairs that ``-DGGML_CUDA_FA_QUANTS=...`` asks for (ggml/cmake/common.cmake); f16 is always among them."""
    given = {name: value for name, _, value in (option.removeprefix("-D").partition("=") for option in options)}
    wanted = given.get("GGML_CUDA_FA_QUANTS", "").lower()
    if wanted == "all" or given.get("GGML_CUDA_FA_ALL_QUANTS", "").upper() in ("ON", "1", "TRUE"):
        return frozenset((k, v) for k in _CUDA_TYPES for v in _CUDA_TYPES)
    if not wanted:
        return CUDA_DEFAULT_PAIRS
    pairs = (part.strip().partition("-") for part in re.split(r"[;,]", wanted) if part.strip())
    return frozenset({("f16", "f16"), *((k, v) for k, _, v in pairs)})
