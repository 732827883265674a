"""What is asked of a model's memory, where its parts shall lie, and what the devices ask of a buffer."""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from runtime.memory.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A context's extents, under the names of llama_context_params and with their meaning.

    ``n_outputs_max`` 0 stands for ``n_batch``: so many rows of logits are then reserved, as llama.cpp's own tools do.
    """

    n_ctx: int
    n_batch: int = 2048
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    n_seq_max: int = 1
    n_outputs_max: int = 1
    flash_attn: bool = True
    kv_unified: bool = False
    swa_full: bool = False

    @property
    def n_ctx_each(self) -> int:
        """Tokens that one sequence can have: all of them, or its own share."""
        return self.n_ctx if self.kv_unified else self.n_ctx // self.n_seq_max


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which layers lie where, under llama.cpp's names.

    ``n_gpu_layers`` counts from the last layer, the output layer being one of them (n_layer + 1 is all). An empty
    ``tensor_split`` shares them equally (llama.cpp shares by free memory then, which a header cannot know).
    ``cpu_expert_layers`` are the layers whose experts stay on the host: a number means that many from the first
    (--n-cpu-moe).
    """

    n_gpu_layers: int
    tensor_split: tuple[float, ...] = ()
    cpu_expert_layers: frozenset[int] | int = 0
    offload_kqv: bool = True

    def keeps_experts(self, layer: int) -> bool:
        """Whether the experts of ``layer`` stay on the host whatever device the layer is on."""
        if isinstance(self.cpu_expert_layers, int):
            return layer < self.cpu_expert_layers
        return layer in self.cpu_expert_layers


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the backend of the GPUs asks of buffers, and what the host does with its weights.

    ``alignment`` in bytes; quantized rows are padded to ``row_padding`` elements; ``offload_rows`` as of ``schedule``;
    ``pipelines``: it can work on successive micro-batches; ``host_buffer``: it offers memory of the host for
    transfers, where host weights then lie; ``fuses``: it computes an expert mixture's routing and its sum in one go
    and needs their operands until the end; ``widens_cache``: flash attention of three tokens and more works on an f16
    copy of a cache of another type, kept beside its result; ``repacked``: weight types that the CPU rearranges, into
    a buffer of the same size that no GPU reads.
    """

    alignment: int = 128
    row_padding: int = 512
    offload_rows: int = 32
    pipelines: bool = True
    host_buffer: bool = True
    fuses: bool = True
    widens_cache: bool = True
    repacked: frozenset[str] = frozenset()


_AVX2: Final = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})


def repacked_types(cpu_flags: Collection[str]) -> frozenset[str]:
    """Weight types that ggml rearranges on such a CPU (ggml_repack_get_optimal_repack_type in ggml-cpu/repack.cpp)."""
    if "avx2" in cpu_flags:
        return _AVX2 | {"Q2_K"} if "avx512f" in cpu_flags else _AVX2
    if "asimddp" in cpu_flags:
        return _AVX2 | ({"Q5_K", "Q6_K", "Q8_0", "Q1_0"})
    return frozenset()


# ggml_backend_cuda_buffer_type_get_alignment, MATRIX_ROW_PADDING, GGML_OP_OFFLOAD_MIN_BATCH, graph_optimize and
# ggml_cuda_flash_attn_ext_get_alloc_size of ggml/src/ggml-cuda. Not in any buffer, so not here: CUDA's own context and
# the pool of ggml_cuda_pool, from which kernels take scratch memory while they run.
CUDA: Final = Traits(repacked=_AVX2 | {"Q2_K"})
# a ggml-rpc-server that computes on its CPU
RPC: Final = Traits(
    alignment=32,
    row_padding=0,
    offload_rows=0,
    host_buffer=False,
    fuses=False,
    widens_cache=False,
    repacked=CUDA.repacked,
)
HOST_ALIGNMENT: Final = 32  # TENSOR_ALIGNMENT in ggml-impl.h


def layer_devices(shape: ModelShape, placement: Placement, n_devices: int) -> tuple[int, ...]:
    """The device of each layer and, last, of the output layer: 0 the host, 1 the first GPU.

    The rule is get_layer_buft_list of load_tensors in src/llama-model.cpp, in its 32-bit floating point.
    """
    n_all = shape.n_layer_all
    asked = placement.n_gpu_layers if placement.n_gpu_layers >= 0 else n_all + 1
    if not n_devices or not asked:
        return (0,) * (n_all + 1)
    given = (*placement.tensor_split, *(0.0,) * n_devices)[:n_devices]
    parts = given if any(given) else (1.0,) * n_devices
    bounds, total = [], 0.0
    for part in parts:
        total = _f32(total + _f32(part))
        bounds.append(total)
    bounds = [_f32(bound / total) for bound in bounds]
    start, used = max(n_all + 1 - asked, 0), min(asked, n_all + 1)
    devices = []
    for layer in range(n_all + 1):
        if layer < start:
            devices.append(0)
        else:
            share = _f32(_f32(layer - start) / _f32(used))
            devices.append(1 + next((i for i, bound in enumerate(bounds) if bound > share), n_devices - 1))
    return tuple(devices)


def _f32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
