"""Bytes that generating one token reads: what bounds its speed where memory is slower than arithmetic.

Every weight counts once, in the type it has in the file, but for tables of which a token takes one row, and for experts
that the router does not choose. Keys and values of all tokens in the cache count, within a layer's window. Left out are
activations, which stay in the CPU's caches. Which tensors are tables follows src/llama-model.cpp of llama.cpp 0c1e570.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from runtime.memory.shape import LAYER_TENSOR, all_tensors, shape_of
from runtime.memory.weights import EXPERTS
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import GgufHeader, TensorInfo

_TABLES: Final = frozenset({"token_embd", "position_embd", "token_types", "per_layer_token_embd"})
_F32_BYTES: Final = 4


def read_bytes_per_token(headers: Sequence[GgufHeader], *, type_k: str, type_v: str, tokens: float) -> float:
    """Bytes read for one token with ``tokens`` in the cache; ``headers`` are those of all files of the model."""
    return weight_read_bytes(headers) + cache_read_bytes(headers, type_k=type_k, type_v=type_v, tokens=tokens)


def weight_read_bytes(headers: Sequence[GgufHeader]) -> float:
    """Bytes of weights that one token reads."""
    shape = shape_of(headers)
    total = 0.0
    for tensor in all_tensors(headers):
        found = LAYER_TENSOR.fullmatch(tensor.name)
        layer = int(found[1]) if found else None
        name = tensor.name.removesuffix(".weight")
        if layer is None and name in _TABLES:
            is_output = name == "token_embd" and shape.is_tied
            total += _row(tensor) + (tensor.nbytes if is_output else 0)
        elif layer is not None and layer >= shape.n_layer:
            continue  # only predicts drafts
        elif layer is not None and EXPERTS.search(tensor.name) and shape.n_expert:
            total += tensor.nbytes * (shape.n_expert_used[layer] or shape.n_expert) / shape.n_expert
        else:
            total += tensor.nbytes
    return total


def cache_read_bytes(headers: Sequence[GgufHeader], *, type_k: str, type_v: str, tokens: float) -> float:
    """Bytes of keys, values and recurrent states that one token reads."""
    shape = shape_of(headers)
    per_k, per_v = _per_element(type_k), 0.0 if shape.key_only else _per_element(type_v)
    total = 0.0
    for layer in shape.layers[: shape.n_layer]:
        if layer.has_attention:  # layers that share another's keys read them too
            reach = min(tokens, layer.window) if layer.window else tokens
            total += reach * layer.n_head_kv * (layer.head_k * per_k + layer.head_v * per_v)
        if layer.is_recurrent:
            total += _F32_BYTES * (shape.state_r + shape.state_s)
    return total


def _row(tensor: TensorInfo) -> float:
    return tensor.nbytes * tensor.shape[0] / max(1, tensor.n_elements)


def _per_element(type_name: str) -> float:
    kind = GGML_TYPES_BY_NAME[type_name.upper()]
    return kind.block_bytes / kind.block_size
