"""Attention of one layer as a graph: queries, keys and values, the cache, the sum over it.

After build_qkv, build_attn and build_attn_mha of src/llama-graph.cpp and the cache's own views and writes (get_k, cpy_k
and their like in src/llama-kv-cache.cpp), llama.cpp 0c1e570.
"""

from __future__ import annotations

from typing import Final

from runtime.memory import graph as g
from runtime.memory.building import CacheInputs, Layer
from runtime.memory.cache import v_rows
from runtime.memory.graph import Tensor

_SCALED_QUERY: Final = frozenset({"gemma", "gemma2", "gemma3", "phi3"})


def attention(layer: Layer, normed: Tensor) -> Tensor:
    shape = layer.shape
    q, k, v = _query_key_value(layer, normed)
    if shape.head_k and layer.has("attn_q_norm") and layer.width("attn_q_norm") == shape.head_k:
        q = _rope(layer, layer.norm(q, "attn_q_norm"))
        k = _rope(layer, layer.norm(k, "attn_k_norm"))
    else:
        q, k = _rope(layer, q), _rope(layer, k)
    if layer.architecture in _SCALED_QUERY:
        q = g.like("SCALE", q)
    inputs = layer.b.inputs_of(shape)
    if inputs.k_rotation is not None:
        q, k = _rotate(q, inputs.k_rotation), _rotate(k, inputs.k_rotation)
    if inputs.v_rotation is not None:
        v = _rotate(v, inputs.v_rotation)
    for tensor in (q, k, v) if layer.b.shape.has_windows else (q, v, k):
        layer.b.graph.expand(tensor)
    current = _attend(layer, q, *_store(layer, k, v, inputs), inputs.mask)
    if inputs.v_rotation is not None:
        current = _rotate(current, inputs.v_rotation)
    if not layer.has("attn_output"):
        return g.cont(g.view(current, (normed.ne[0], layer.n_tokens), (current.nb[1],)))
    into = layer.info("attn_output").shape[0]
    if current.ne[0] != into:  # values that are widened again (MLA)
        current = g.Tensor("CONT", "F32", (into, layer.n_tokens, 1, 1), [current])
    return layer.linear("attn_output", current)


def _query_key_value(layer: Layer, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape, n = layer.shape, layer.n_tokens
    widths = ((shape.head_k, shape.n_head), (shape.head_k, shape.n_head_kv), (shape.head_v, shape.n_head_kv))
    if layer.has("attn_qkv"):
        joined = layer.linear("attn_qkv", normed)
        parts = [g.view(joined, (head, count, n), (g.row_bytes("F32", head), joined.nb[1])) for head, count in widths]
        return parts[0], parts[1], parts[2]
    if not all(layer.has(name) for name in ("attn_q", "attn_k", "attn_v")):
        return _latent(layer, normed)
    made = [layer.linear(name, normed) for name in ("attn_q", "attn_k", "attn_v")]
    if layer.has("attn_q_norm") and layer.width("attn_q_norm") != shape.head_k:
        made[:2] = [layer.norm(made[0], "attn_q_norm"), layer.norm(made[1], "attn_k_norm")]
    q, k, v = (g.reshape(t, head, count, n) for t, (head, count) in zip(made, widths, strict=True))
    return q, k, v


def _latent(layer: Layer, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The general form of queries, keys and values that are made by way of narrower ones (MLA and its like)."""
    shape, n = layer.shape, layer.n_tokens
    narrow = layer.linear("attn_q_a", normed) if layer.has("attn_q_a") else normed
    name = next((name for name in ("attn_q_b", "attn_q") if layer.has(name)), None)
    wide = layer.linear(name, narrow) if name else narrow
    q = g.Tensor("CONCAT", "F32", (shape.head_k, shape.n_head, n, 1), [wide, narrow])
    k = g.Tensor("CONCAT", "F32", (shape.head_k, shape.n_head_kv, n, 1), [normed, wide])
    v = g.Tensor("CONT", "F32", (shape.head_v, shape.n_head_kv, n, 1), [normed])
    return q, k, v


def _store(layer: Layer, k: Tensor, v: Tensor, inputs: CacheInputs) -> tuple[Tensor, Tensor]:
    """This micro-batch's keys and values into the cache (cpy_k, cpy_v), and views of all of it (get_k, get_v)."""
    demand, shape, streams, n_kv = layer.b.demand, layer.shape, layer.b.streams, inputs.cells
    kind_k, kind_v = demand.type_k.upper(), demand.type_v.upper()
    v_width = v_rows(layer.b.shape, shape, flash_attn=demand.flash_attn)
    cache_k = g.held(kind_k, (shape.k_width, n_kv, streams), layer.cache_home, weight=False)
    cache_v = g.held(kind_v, (v_width, n_kv, streams), layer.cache_home, weight=False)
    flat_k = g.reshape(cache_k, shape.k_width, n_kv * streams) if streams > 1 else cache_k
    flat_v = g.reshape(cache_v, v_width, n_kv * streams) if streams > 1 else cache_v
    rows = g.view(k, (shape.k_width, layer.n_tokens), (k.nb[2],))
    layer.b.graph.expand(g.set_rows(flat_k, rows, inputs.k_rows))
    if demand.flash_attn:
        rows = g.view(v, (shape.v_width, layer.n_tokens), (v.nb[2],))
        layer.b.graph.expand(g.set_rows(flat_v, rows, inputs.v_rows))
    else:
        whole = v.nb[2] == g.row_bytes(v.kind, shape.v_width)
        rows = (g.reshape if whole else g.cont)(v, shape.v_width, layer.n_tokens)
        rows = g.pad(rows, v_width - shape.v_width) if shape.v_width < v_width else rows
        onto = g.reshape(cache_v, 1, cache_v.n_elements)
        layer.b.graph.expand(g.set_rows(onto, g.reshape(rows, 1, rows.n_elements), inputs.v_rows))
    k = _cached(cache_k, shape.head_k, shape.n_head_kv, shape.k_width, n_kv, streams)
    if demand.flash_attn:
        return k, _cached(cache_v, shape.head_v, shape.n_head_kv, v_width, n_kv, streams)
    strides = tuple(g.row_bytes(kind_v, n_kv * factor) for factor in (shape.head_v, 1, v_width))
    return k, g.view(cache_v, (n_kv, shape.n_head_kv, shape.head_v, streams), strides)


def _attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """build_attn_mha."""
    per_stream = q.ne[2] // layer.b.streams
    strides = (q.nb[1], q.nb[2], q.nb[2] * per_stream)
    q = g.permute(g.view(q, (q.ne[0], q.ne[1], per_stream, layer.b.streams), strides), 0, 2, 1, 3)
    k, v = g.permute(k, 0, 2, 1, 3), g.permute(v, 0, 2, 1, 3)
    if layer.b.demand.flash_attn:
        current = g.flash_attn_ext(q, k, v, mask)
        current = g.reshape(current, current.ne[0] * current.ne[1], current.ne[2] * current.ne[3])
        return layer.b.graph.expand(current)
    scores = g.mul_mat(k, q)
    if layer.b.shape.attention_soft_cap:
        scores = g.like("SCALE", g.like("UNARY", g.like("SCALE", scores)))
    current = g.permute(g.mul_mat(v, g.like("SOFT_MAX", scores, mask)), 0, 2, 1, 3)
    current = g.cont(current, current.ne[0] * current.ne[1], current.ne[2] * current.ne[3])
    if not layer.b.job.placement.offload_kqv:
        current.backend = layer.b.job.n_gpus
    return layer.b.graph.expand(current)


def _rope(layer: Layer, current: Tensor) -> Tensor:
    return g.like("ROPE", current, layer.b.positions) if layer.b.shape.has_rope else current


def _rotate(current: Tensor, rotation: Tensor) -> Tensor:
    """llama_mul_mat_hadamard."""
    n = rotation.ne[0]
    rows = (g.reshape if current.is_contiguous else g.cont)(current, n, current.n_elements // n)
    return g.reshape(g.mul_mat(rotation, rows), *current.ne)


def _cached(cache: Tensor, head: int, n_head_kv: int, width: int, n_kv: int, streams: int) -> Tensor:
    strides = tuple(g.row_bytes(cache.kind, elements) for elements in (head, width, width * n_kv))
    return g.view(cache, (head, n_head_kv, n_kv, streams), strides)
