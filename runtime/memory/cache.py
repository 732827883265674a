"""Bytes of what a context remembers: keys and values of each layer, and the states of recurrent ones.

Exact to the buffers of src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp and llama-memory-recurrent.cpp (llama.cpp
0c1e570). Not counted: the index keys of sparse attention (DeepSeek 3.2 and 4, GLM DSA, MiniMax M3 and their like).
"""

from __future__ import annotations

from typing import Final

from runtime.memory.graph import row_bytes
from runtime.memory.placement import HOST_ALIGNMENT, Demand, Placement, Traits, layer_devices
from runtime.memory.shape import Headers, LayerShape, ModelShape, shape_of

_CELLS: Final = (
    256  # contexts and windows are rounded up to so many cells (GGML_PAD in llama-context.cpp and -iswa.cpp)
)
_WITHOUT_MEMORY: Final = frozenset(
    {
        *("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"),
        *("wavtokenizer-dec", "modern-bert", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1"),
    }
)


def cells(shape: ModelShape, demand: Demand) -> tuple[int, int, int]:
    """(cells for each stream of a layer without a window, of one with a window, number of streams)."""
    asked = _padded(demand.n_ctx or shape.n_ctx_train, _CELLS)
    streams = 1 if demand.kv_unified else demand.n_seq_max
    base = asked if demand.kv_unified else _padded(asked // demand.n_seq_max, _CELLS)
    window = max((layer.window for layer in shape.layers), default=0)
    sequences = demand.n_seq_max if demand.kv_unified else 1
    swa = base if demand.swa_full else _padded(min(base, window * sequences + micro_batch(shape, demand)), _CELLS)
    return base, swa, streams


def micro_batch(shape: ModelShape, demand: Demand) -> int:
    """n_ubatch as the context settles it."""
    n_batch = min(demand.n_ctx or shape.n_ctx_train, demand.n_batch)
    return min(n_batch, demand.n_ubatch or n_batch)


def cache_bytes(
    headers: Headers, demand: Demand, placement: Placement, n_devices: int, traits: Traits
) -> tuple[int, ...]:
    """Bytes on the host and on each GPU."""
    shape = shape_of(headers)
    devices = layer_devices(shape, placement, n_devices)
    total = [0] * (n_devices + 1)
    for index in range(shape.n_layer):
        device = devices[index] if placement.offload_kqv else 0
        total[device] += _layer_bytes(shape, index, demand, traits.alignment if device else HOST_ALIGNMENT)
    return tuple(total)


def layer_cache_bytes(headers: Headers, demand: Demand) -> tuple[int, ...]:
    """Bytes of each layer, those that only predict drafts among them (they have none)."""
    shape = shape_of(headers)
    sizes = (_layer_bytes(shape, index, demand, HOST_ALIGNMENT) for index in range(shape.n_layer))
    return (*sizes, *(0,) * (shape.n_layer_all - shape.n_layer))


def v_rows(shape: ModelShape, layer: LayerShape, *, flash_attn: bool) -> int:
    """Elements of values that a token takes in ``layer``: without flash attention as many as in the widest layer."""
    return layer.v_width if flash_attn else max(other.v_width for other in shape.layers)


def _layer_bytes(shape: ModelShape, index: int, demand: Demand, alignment: int) -> int:
    if shape.architecture in _WITHOUT_MEMORY:
        return 0
    layer = shape.layers[index]
    base, swa, streams = cells(shape, demand)
    count = (swa if layer.window else base) * streams
    size = 0
    if layer.owns_kv:
        size += _padded(row_bytes(demand.type_k.upper(), layer.k_width) * count, alignment)
        if not shape.key_only:
            width = v_rows(shape, layer, flash_attn=demand.flash_attn)
            size += _padded(row_bytes(demand.type_v.upper(), width) * count, alignment)
    if layer.is_recurrent:
        sequences = max(1, demand.n_seq_max)
        size += _padded(4 * shape.state_r * sequences, alignment) + _padded(4 * shape.state_s * sequences, alignment)
    return size


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment
