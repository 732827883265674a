"""Layers that keep a state instead of keys and values, as graphs.

After src/models/lfm2.cpp, src/models/mamba-base.cpp and build_rs of src/llama-graph.cpp, llama.cpp 0c1e570.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.memory import graph as g
from runtime.memory.building import Layer
from runtime.memory.graph import Tensor


def short_convolution(layer: Layer, current: Tensor) -> Tensor:
    """The gated short convolution of LFM2 ."""
    kernel, width, n_seqs = layer.weight("shortconv.conv"), current.ne[0], layer.b.n_seqs
    current = g.reshape(current, width, current.ne[1] // n_seqs, n_seqs)
    joined = g.mul_mat(layer.weight("shortconv.in_proj"), current)
    part = (width, joined.ne[1], joined.ne[2])
    b, c, x = (g.view(joined, part, (joined.nb[1], joined.nb[2])) for _ in range(3))
    mixed = g.transpose(g.like("MUL", b, x))
    kept = kernel.ne[0] - 1
    state = _state(layer, layer.b.shape.state_r)
    mixed = g.concat(g.reshape(_load_state(layer, state, g.get_rows), kept, width, n_seqs), mixed)
    newest = g.view(mixed, (kept, width, n_seqs), (mixed.nb[1], mixed.nb[2]))
    layer.b.graph.expand(g.cpy(newest, g.view(state, (kept * width, n_seqs), (state.nb[1],))))
    convolved = g.Tensor("SSM_CONV", "F32", (width, mixed.ne[0] - kept, n_seqs, 1), [mixed, kernel])
    out = g.mul_mat(layer.weight("shortconv.out_proj"), g.like("MUL", c, convolved))
    return g.reshape(out, out.ne[0], out.ne[1] * out.ne[2])


def mamba2(layer: Layer, current: Tensor) -> Tensor:
    """A Mamba 2 layer (build_mamba2_layer)."""
    convolution, n_seqs, expand = layer.weight("ssm_conv1d"), layer.b.n_seqs, layer.b.graph.expand
    width, kept, inner = convolution.ne[1], convolution.ne[0] - 1, layer.info("ssm_out").shape[0]
    heads = layer.info("ssm_d", suffix="").shape[1]
    per_seq, head = layer.n_tokens // n_seqs, inner // heads
    state, memory = _state(layer, layer.b.shape.state_r), _state(layer, layer.b.shape.state_s)
    n_state = layer.b.shape.state_s // inner
    loaded = g.reshape(_load_state(layer, state, g.get_rows), kept, width, n_seqs)
    joined = layer.linear("ssm_in", current)
    joined = g.reshape(joined, joined.ne[0], per_seq, n_seqs)
    z = g.view(joined, (head, heads, per_seq, n_seqs), (4 * head, joined.nb[1], joined.nb[2]))
    mixed = g.view(joined, (width, per_seq, n_seqs), (joined.nb[1], joined.nb[2]))
    steps = g.view(joined, (heads, per_seq, n_seqs), (joined.nb[1], joined.nb[2]))
    mixed = g.concat(loaded, g.transpose(mixed))
    newest = g.view(mixed, (kept, width, n_seqs), (mixed.nb[1], mixed.nb[2]))
    expand(g.cpy(newest, g.view(state, (kept * width, n_seqs), (state.nb[1],))))
    mixed = g.Tensor("SSM_CONV", "F32", (width, per_seq, n_seqs, 1), [mixed, convolution])
    mixed = g.like("UNARY", g.like("ADD", mixed, layer.weight("ssm_conv1d", suffix=".bias")))
    x = g.view(mixed, (head, heads, per_seq, n_seqs), (4 * head, mixed.nb[1], mixed.nb[2]))
    groups = (width - inner) // (2 * n_state)
    b, c = (
        g.view(mixed, (n_state, groups, per_seq, n_seqs), (4 * n_state, mixed.nb[1], mixed.nb[2])) for _ in range(2)
    )
    steps = g.like("ADD", g.cont(steps), layer.weight("ssm_dt", suffix=".bias"))

    def scan(states: Tensor, rows: Tensor) -> Tensor:
        states = g.reshape(states, n_state, head, heads, states.ne[1])
        sources = [states, x, steps, layer.weight("ssm_a", suffix=""), b, c, rows]
        return g.Tensor("SSM_SCAN", "F32", (x.n_elements + n_state * inner * n_seqs, 1, 1, 1), sources)

    scanned = _load_state(layer, memory, scan)
    row = 4 * n_state * inner
    written = g.view(scanned, (n_state * inner, n_seqs, 1), (row, row * n_seqs))
    expand(g.cpy(written, g.view(memory, (n_state * inner, n_seqs, 1), (memory.nb[1], row))))
    y = g.view(scanned, (head, heads, per_seq, n_seqs), (x.nb[1], heads * x.nb[1], per_seq * heads * x.nb[1]))
    y = g.like("ADD", y, g.like("MUL", x, layer.weight("ssm_d", suffix="")))
    y = g.glu(g.cont(z), y)
    if layer.has("ssm_norm"):
        y = layer.norm(g.reshape(y, inner // groups, groups, per_seq, n_seqs), "ssm_norm")
    return layer.linear("ssm_out", g.reshape(y, inner, per_seq * n_seqs))


def state_space(layer: Layer, current: Tensor) -> Tensor:
    """The general form of a recurrent layer: in, convolved, scanned, gated, out."""
    n_seqs, n = layer.b.n_seqs, layer.n_tokens
    into = next((name for name in ("ssm_in", "attn_qkv", "time_mix_receptance") if layer.has(name)), None)
    joined = layer.linear(into, current) if into else current
    width = max(joined.ne[0], current.ne[0])
    rows = g.cont(g.transpose(g.reshape(joined, joined.ne[0], n // n_seqs, n_seqs)))
    _load_state(layer, _state(layer, max(1, layer.b.shape.state_r)), g.get_rows)
    kept = _load_state(layer, _state(layer, max(1, layer.b.shape.state_s)), g.get_rows)
    mixed = g.like("UNARY", g.Tensor("SSM_CONV", "F32", (width, n, 1, 1), [rows]))
    scanned = g.Tensor("SSM_SCAN", "F32", (width * n + kept.n_elements, 1, 1, 1), [mixed, kept])
    wide = g.Tensor("CONT", "F32", (width, n, 1, 1), [joined])
    gated = g.glu(g.view(scanned, (width, n), ()), wide)
    out = next((name for name in ("ssm_out", "time_mix_output", "attn_output") if layer.has(name)), None)
    if out is None:
        return g.cont(g.view(gated, (current.ne[0], n), (gated.nb[1],)))
    return g.mul_mat(layer.weight(out), g.cont(g.view(gated, (layer.info(out).shape[0], n), (gated.nb[1],))))


def _state(layer: Layer, width: int) -> Tensor:
    return g.held("F32", (width, max(1, layer.b.n_seqs)), layer.cache_home, weight=False)


def _load_state(layer: Layer, state: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """build_rs: one state zeroed, those of the sequences read, the spare ones (none here) moved."""
    width, expand = state.ne[0], layer.b.graph.expand
    states = g.reshape(state, width, state.ne[1])
    expand(g.scale_inplace(g.view(states, (width,), ())))
    loaded = expand(read(states, layer.b.main_states))
    spare = g.get_rows(states, layer.b.spare_states)
    expand(g.cpy(spare, g.view(state, (width, 0), (state.nb[1],))))
    return loaded
