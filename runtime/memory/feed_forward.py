"""The feed-forward part of one layer as a graph, dense or a mixture of experts.

After build_ffn and build_moe_ffn of src/llama-graph.cpp, llama.cpp 0c1e570.
"""

from __future__ import annotations

from typing import Final

from runtime.memory import graph as g
from runtime.memory.building import Layer
from runtime.memory.graph import Tensor

_UNNORMED_WEIGHTS: Final = frozenset({"qwen2moe"})  # the chosen experts' weights are not brought to sum to one


def feed_forward(layer: Layer, current: Tensor, suffix: str) -> Tensor:
    """build_ffn; ``suffix`` is "_shexp" for the expert that all tokens share."""
    up, gate, down = f"ffn_up{suffix}", f"ffn_gate{suffix}", f"ffn_down{suffix}"
    if not layer.has(up):
        return current
    value = layer.linear(up, current)
    if layer.has(gate):
        current = g.glu(layer.linear(gate, current), value)
    elif layer.has(down) and layer.info(down).shape[0] * 2 == value.ne[0]:
        current = g.glu(value)
    else:
        current = g.like("UNARY", value)
    return layer.linear(down, current)


def experts(layer: Layer, current: Tensor) -> Tensor:
    """build_moe_ffn, and the shared expert beside it."""
    shape, expand = layer.b.shape, layer.b.graph.expand
    used, n, normed = shape.n_expert_used[layer.index], current.ne[1], current
    chances = g.like("SOFT_MAX", g.mul_mat(layer.weight("ffn_gate_inp"), current))
    ranked = chances
    if layer.has("exp_probs_b.bias", suffix=""):
        ranked = g.like("ADD", chances, layer.weight("exp_probs_b.bias", suffix=""))
    order = g.argsort(ranked)
    chosen = g.view(order, (used, order.ne[1]), (order.nb[1],))
    weights = g.get_rows(g.reshape(chances, 1, shape.n_expert, n), chosen)
    if layer.architecture not in _UNNORMED_WEIGHTS:
        flat = g.reshape(weights, used, n)
        weights = g.reshape(g.like("DIV", flat, g.like("CLAMP", g.sum_rows(flat))), 1, used, n)
    if shape.expert_scale:
        weights = g.like("SCALE", weights)
    expand(weights)
    if layer.b.job.n_gpus:  # ggml_cuda_topk_moe_fusion: all of the routing lives until the node after it
        layer.b.graph.kept[weights] = [chances, order, chosen, weights]
    wide = g.reshape(current, current.ne[0], 1, n)
    if layer.has("ffn_gate_up_exps"):
        joined = g.mul_mat_id(layer.weight("ffn_gate_up_exps"), wide, chosen)
        half = (joined.ne[0] // 2, joined.ne[1], joined.ne[2])
        value, gate = (g.view(joined, half, (joined.nb[1], joined.nb[2])) for _ in range(2))
        inner = g.glu(gate, value)
    else:
        value = g.mul_mat_id(layer.weight("ffn_up_exps"), wide, chosen)
        if layer.has("ffn_gate_exps"):
            inner = g.glu(g.mul_mat_id(layer.weight("ffn_gate_exps"), wide, chosen), value)
        else:
            inner = g.like("UNARY", value)
    results = g.mul_mat_id(layer.weight("ffn_down_exps"), inner, chosen)
    outcome = expand(g.like("MUL", results, weights))
    parts = [expand(g.view(outcome, (outcome.ne[0], n), (outcome.nb[2],))) for _ in range(used)]
    total = parts[0]
    for part in parts[1:]:
        total = expand(g.like("ADD", total, part))
    if layer.b.job.n_gpus and used > 1:  # ggml_cuda_match_moe_weighted_reduction: so the sum is not made in place
        layer.b.graph.kept[total] = [results, weights]
    total = g.cont(total) if used == 1 else total
    if not layer.has("ffn_up_shexp"):
        return total
    if layer.has("ffn_gate_inp_shexp"):
        raw = g.mul_mat(layer.weight("ffn_gate_inp_shexp"), normed)
        gate = g.like("DIV", g.like("UNARY", raw), raw)
        return g.like("ADD", total, g.like("MUL", feed_forward(layer, normed, "_shexp"), gate))
    return g.like("ADD", total, feed_forward(layer, normed, "_shexp"))
