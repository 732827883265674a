"""A model's graph for one micro-batch, node for node as llama.cpp builds it.

Written after src/models/ of llama.cpp 0c1e570. Which parts a layer has is read from its tensors, so architectures
outside ``EXACT`` get the general form of what they have.
"""

from __future__ import annotations

from typing import Final

from runtime.memory import graph as g
from runtime.memory.attention import attention
from runtime.memory.building import Building, Layer, Pass
from runtime.memory.feed_forward import experts, feed_forward
from runtime.memory.graph import Graph, Tensor
from runtime.memory.recurrent import mamba2, short_convolution, state_space
from runtime.memory.shape import ModelShape
from toolchain.base.gguf_header import TensorInfo

EXACT: Final = frozenset(
    {
        *("llama", "qwen2", "qwen3", "qwen3moe", "qwen2moe", "gemma", "gemma2", "gemma3", "phi3", "granite"),
        *("granitehybrid", "olmo2", "starcoder2", "lfm2"),
    }
)
"""Architectures whose graph is held against the library to the byte (tests/build/test_memory_grid.py)."""

_SCALED_EMBEDDING: Final = frozenset({"gemma", "gemma2", "gemma3"})
_RESIDUAL_FIRST: Final = frozenset({"lfm2"})  # which operand of the sums comes first: the one that is overwritten


def build(job: Pass) -> tuple[Graph, Tensor]:
    """The graph and its tensor of logits."""
    building, outside, device = Building(job), job.shape.tensors, job.devices[-1]
    current = _embedding(building)
    out_ids = g.graph_input("I32", job.n_outputs)
    for place, index in enumerate(job.layers):
        last = place + 1 == len(job.layers)
        current = _block(Layer(building, index), current, out_ids if last else None)
    norm = outside.get("output_norm") or outside.get("token_embd_norm")
    current = g.like(job.shape.norm_op, current)
    if norm is not None:
        current = g.like("MUL", current, building.weight(norm, device))
    if "output_norm.bias" in outside:
        current = g.like("ADD", current, building.weight(outside["output_norm.bias"], device))
    embedded = current
    current = g.mul_mat(building.weight(outside.get("output") or embedding(job.shape), device), current)
    if "output.bias" in outside:
        current = g.like("ADD", current, building.weight(outside["output.bias"], device))
    if job.shape.final_soft_cap:
        current = g.like("SCALE", g.like("UNARY", g.like("SCALE", current)))
    if job.shape.logit_scale:
        current = g.like("SCALE", current)
    building.graph.expand(current)
    embedded.is_output = current.is_output = True
    return building.graph, current


def embedding(shape: ModelShape) -> TensorInfo:
    """The token embedding; where it has another name or none, one of the extents that the metadata gives."""
    extents = (shape.n_embd, max(1, shape.n_vocab))
    assumed = TensorInfo(
        name="token_embd.weight", shape=extents, type="F16", offset=0, nbytes=2 * extents[0] * extents[1]
    )
    return shape.tensors.get("token_embd", assumed)


def _embedding(building: Building) -> Tensor:
    job, expand = building.job, building.graph.expand
    tokens = g.graph_input("I32", job.n_tokens)
    current = expand(g.get_rows(building.weight(embedding(job.shape), 0), tokens))
    expand(g.graph_input("F32", job.shape.n_embd, job.n_tokens))  # embeddings instead of tokens
    if job.shape.embedding_scale:
        current = expand(g.like("SCALE", current))
    if job.shape.architecture in _SCALED_EMBEDDING:
        current = g.like("SCALE", current)
    return current


def _block(layer: Layer, current: Tensor, out_ids: Tensor | None) -> Tensor:
    shape, residual = layer.b.shape, current
    normed = layer.norm(current, "attn_norm") if layer.has("attn_norm") else current
    current = _mix(layer, normed)
    if out_ids is not None:
        current, residual = g.get_rows(current, out_ids), g.get_rows(residual, out_ids)
    if layer.has("post_attention_norm") and layer.has("ffn_norm" if layer.has("attn_norm") else "ffn_up"):
        current = layer.norm(current, "post_attention_norm")
    if shape.residual_scale:
        current = g.like("SCALE", current)
    pair = (residual, current) if layer.architecture in _RESIDUAL_FIRST else (current, residual)
    before = current = g.like("ADD", *pair)
    current = layer.norm(current, "ffn_norm") if layer.has("ffn_norm") else current
    current = experts(layer, current) if layer.has("ffn_gate_inp") else feed_forward(layer, current, "")
    if layer.has("post_ffw_norm"):
        current = layer.norm(current, "post_ffw_norm", pinned=False)
    if shape.residual_scale:
        current = g.like("SCALE", current)
    pair = (before, current) if layer.architecture in (*_RESIDUAL_FIRST, "phi3") else (current, before)
    return g.like("ADD", *pair)


def _mix(layer: Layer, normed: Tensor) -> Tensor:
    """What carries information from token to token."""
    if not layer.shape.is_recurrent:
        return attention(layer, normed) if layer.shape.has_attention else g.cont(normed)
    if layer.has("shortconv.conv"):
        return short_convolution(layer, normed)
    if layer.has("ssm_d", suffix="") and layer.has("ssm_in") and layer.info("ssm_d", suffix="").shape[0] == 1:
        return mamba2(layer, normed)
    return state_space(layer, normed)
