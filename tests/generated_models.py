"""Small GGUF models of real architectures, written in milliseconds; they load and decode.

Matrices are zeros in any type, or random in f16 and f32; norms are ones. The vocabulary is byte-sized SentencePiece.
``write_header`` writes only the header of such a model, and a hole of the right size for its tensors' data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import gguf
import numpy as np

Family: TypeAlias = Literal[
    "llama",
    "llama-tied",
    "mixtral",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "granite",
    "granitehybrid",
    "olmo2",
    "starcoder2",
    "lfm2",
]
FAMILIES: Final[tuple[Family, ...]] = get_args(Family)


@dataclass(frozen=True, kw_only=True)
class Extents:
    """A model's extents, elements. ``n_ff`` is of dense layers and of each expert."""

    n_layer: int = 4
    n_embd: int = 256
    n_vocab: int = 512
    n_head: int = 4
    n_head_kv: int = 2
    head: int = 64
    n_ff: int = 512
    n_ctx_train: int = 131072
    n_expert: int = 8
    n_expert_used: int = 2
    window: int = 1024


def write_model(
    path: Path,
    family: Family,
    *,
    type: str = "f16",
    random: bool = False,
    seed: int = 0,
    template: str = "",
    **extents: int,
) -> Path:
    """A model of ``family`` at ``path``; ``extents`` are fields of Extents. ``type`` as gguf-py spells it, any case.
    ``template`` is its chat template, if it shall have one.
    """
    writer, tensors = _describe(path, family, Extents(**extents), type)
    if template:
        writer.add_chat_template(template)
    numbers = np.random.default_rng(seed)
    for tensor in tensors:
        writer.add_tensor(
            tensor.name, _data(tensor, random, numbers), raw_shape=tensor.raw_shape, raw_dtype=tensor.kind
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_header(path: Path, family: Family, *, type: str = "f16", **extents: int) -> Path:
    """A sparse file: the header of such a model, its data a hole. It has the whole size and takes a few KB of disk."""
    writer, tensors = _describe(path, family, Extents(**extents), type)
    size = 0
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.raw_shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.kind)
        size += -(-tensor.nbytes // 32) * 32
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    writer.fout[0].flush()
    header = -(-writer.fout[0].tell() // 32) * 32
    writer.close()
    with path.open("r+b") as file:
        file.truncate(header + size)
    return path


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """``shape`` in numpy's order, ``raw_shape`` in bytes along the rows as the writer wants it for quantized types."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    @property
    def raw_shape(self) -> tuple[int, ...]:
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, self.kind))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.raw_shape))


def _data(tensor: _Tensor, random: bool, numbers: np.random.Generator) -> np.ndarray[Any, Any]:
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if tensor.kind not in plain:
        return np.zeros(tensor.raw_shape, dtype=np.uint8)
    dtype = plain[tensor.kind]
    if len(tensor.shape) == 1:
        values = np.ones(tensor.shape, dtype) if "norm" in tensor.name else np.zeros(tensor.shape, dtype)
    elif random:
        values = (numbers.standard_normal(tensor.shape, dtype=np.float32) * 0.05).astype(dtype)
    else:
        values = np.zeros(tensor.shape, dtype)
    return values.view(np.uint8).reshape(tensor.raw_shape)


def _describe(path: Path, family: Family, e: Extents, kind: str) -> tuple[gguf.GGUFWriter, list[_Tensor]]:
    architecture = {"llama-tied": "llama", "mixtral": "llama"}.get(family, family)
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=False)
    writer.add_context_length(e.n_ctx_train)
    writer.add_embedding_length(e.n_embd)
    writer.add_block_count(e.n_layer)
    writer.add_feed_forward_length(e.n_ff)
    writer.add_head_count(e.n_head)
    if family == "starcoder2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(e.head)
    writer.add_value_length(e.head)
    writer.add_rope_dimension_count(e.head)
    _vocabulary(writer, e.n_vocab)
    parts = _Parts(family, e, gguf.GGMLQuantizationType[kind.upper()])
    _FAMILIES[family](writer, parts)
    return writer, parts.tensors


def _vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """SentencePiece: three special tokens, the 256 bytes, and as many made-up words as are missing."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"▁w{number}" for number in range(n_vocab - len(words))]
    types = [2, 3, 3, *(6,) * 256, *(1,) * max(0, n_vocab - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words[:n_vocab])
    writer.add_token_scores([-float(i) for i in range(n_vocab)])
    writer.add_token_types(types[:n_vocab])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


class _Parts:
    """Collects tensors; matrices in the asked type, vectors and routers in f32."""

    def __init__(self, family: Family, e: Extents, kind: gguf.GGMLQuantizationType) -> None:
        self.family, self.e, self.kind = family, e, kind
        self.tensors: list[_Tensor] = []

    def matrix(self, name: str, rows: int, width: int, *, experts: int = 0) -> None:
        shape = (experts, rows, width) if experts else (rows, width)
        self.tensors.append(_Tensor(name=f"{name}.weight", shape=shape, kind=self.kind))

    def plain(self, name: str, *shape: int, suffix: str = ".weight") -> None:
        self.tensors.append(_Tensor(name=name + suffix, shape=shape, kind=gguf.GGMLQuantizationType.F32))

    def outside(self, *, tied: bool = False, norm: str = "output_norm", bias: bool = False) -> None:
        self.matrix("token_embd", self.e.n_vocab, self.e.n_embd)
        self.plain(norm, self.e.n_embd)
        if bias:
            self.plain(norm, self.e.n_embd, suffix=".bias")
        if not tied:
            self.matrix("output", self.e.n_vocab, self.e.n_embd)

    def attention(self, i: int, *, bias: bool = False, out_bias: bool = False) -> None:
        e, block = self.e, f"blk.{i}."
        for name, width in (("q", e.n_head * e.head), ("k", e.n_head_kv * e.head), ("v", e.n_head_kv * e.head)):
            self.matrix(f"{block}attn_{name}", width, e.n_embd)
            if bias:
                self.plain(f"{block}attn_{name}", width, suffix=".bias")
        self.matrix(f"{block}attn_output", e.n_embd, e.n_head * e.head)
        if out_bias:
            self.plain(f"{block}attn_output", e.n_embd, suffix=".bias")

    def norms(self, i: int, *names: str, width: int = 0) -> None:
        for name in names:
            self.plain(f"blk.{i}.{name}", width or self.e.n_embd)

    def feed_forward(self, i: int, suffix: str = "") -> None:
        e, block = self.e, f"blk.{i}."
        for name in ("gate", "up"):
            self.matrix(f"{block}ffn_{name}{suffix}", e.n_ff, e.n_embd)
        self.matrix(f"{block}ffn_down{suffix}", e.n_embd, e.n_ff)

    def experts(self, i: int) -> None:
        e, block = self.e, f"blk.{i}."
        self.plain(f"{block}ffn_gate_inp", e.n_expert, e.n_embd)
        for name in ("gate", "up"):
            self.matrix(f"{block}ffn_{name}_exps", e.n_ff, e.n_embd, experts=e.n_expert)
        self.matrix(f"{block}ffn_down_exps", e.n_embd, e.n_ff, experts=e.n_expert)


def _transformer(writer: gguf.GGUFWriter, parts: _Parts) -> None:
    """Llama and those that differ from it by a bias, by norms of queries and keys, or by experts."""
    family, e = parts.family, parts.e
    moe = family in ("mixtral", "qwen3moe", "qwen2moe")
    writer.add_head_count_kv(e.n_head_kv)
    if family in ("granite",):
        writer.add_logit_scale(8.0)
        writer.add_residual_scale(0.22)
        writer.add_embedding_scale(12.0)
    if moe:
        writer.add_expert_count(e.n_expert)
        writer.add_expert_used_count(e.n_expert_used)
        writer.add_expert_feed_forward_length(e.n_ff)
    parts.outside(tied=family in ("llama-tied", "qwen3", "gemma", "granite"))
    for i in range(e.n_layer):
        parts.norms(i, "attn_norm", "ffn_norm")
        parts.attention(i, bias=family in ("qwen2", "qwen2moe"))
        if family in ("qwen3", "qwen3moe"):
            parts.norms(i, "attn_q_norm", "attn_k_norm", width=e.head)
        if moe:
            parts.experts(i)
        else:
            parts.feed_forward(i)
        if family == "qwen2moe":
            parts.plain(f"blk.{i}.ffn_gate_inp_shexp", e.n_embd)
            parts.feed_forward(i, "_shexp")


def _gemma(writer: gguf.GGUFWriter, parts: _Parts) -> None:
    """Gemma 2 and 3: sliding windows, a norm on either side of each block."""
    e = parts.e
    writer.add_head_count_kv(e.n_head_kv)
    writer.add_sliding_window(e.window)
    if parts.family == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    parts.outside(tied=True)
    for i in range(e.n_layer):
        parts.norms(i, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        parts.attention(i)
        if parts.family == "gemma3":
            parts.norms(i, "attn_q_norm", "attn_k_norm", width=e.head)
        parts.feed_forward(i)


def _phi3(writer: gguf.GGUFWriter, parts: _Parts) -> None:
    """Phi 3: queries, keys and values in one matrix, gate and value in another."""
    e = parts.e
    writer.add_head_count_kv(e.n_head_kv)
    parts.outside()
    for i in range(e.n_layer):
        parts.norms(i, "attn_norm", "ffn_norm")
        parts.matrix(f"blk.{i}.attn_qkv", (e.n_head + 2 * e.n_head_kv) * e.head, e.n_embd)
        parts.matrix(f"blk.{i}.attn_output", e.n_embd, e.n_head * e.head)
        parts.matrix(f"blk.{i}.ffn_up", 2 * e.n_ff, e.n_embd)
        parts.matrix(f"blk.{i}.ffn_down", e.n_embd, e.n_ff)


def _olmo2(writer: gguf.GGUFWriter, parts: _Parts) -> None:
    """OLMo 2: norms after the blocks only, those of queries and keys over all heads at once."""
    e = parts.e
    writer.add_head_count_kv(e.n_head_kv)
    parts.outside()
    for i in range(e.n_layer):
        parts.norms(i, "post_attention_norm", "post_ffw_norm")
        parts.attention(i)
        parts.norms(i, "attn_q_norm", width=e.n_head * e.head)
        parts.norms(i, "attn_k_norm", width=e.n_head_kv * e.head)
        parts.feed_forward(i)


def _starcoder2(writer: gguf.GGUFWriter, parts: _Parts) -> None:
    """StarCoder 2: norms and matrices with biases, a feed-forward without a gate."""
    e = parts.e
    writer.add_head_count_kv(e.n_head_kv)
    parts.outside(bias=True)
    for i in range(e.n_layer):
        for name in ("attn_norm", "ffn_norm"):
            parts.norms(i, name)
            parts.plain(f"blk.{i}.{name}", e.n_embd, suffix=".bias")
        parts.attention(i, bias=True, out_bias=True)
        for name, rows, width in (("up", e.n_ff, e.n_embd), ("down", e.n_embd, e.n_ff)):
            parts.matrix(f"blk.{i}.ffn_{name}", rows, width)
            parts.plain(f"blk.{i}.ffn_{name}", rows, suffix=".bias")


def _lfm2(writer: gguf.GGUFWriter, parts: _Parts) -> None:
    """LFM2, a hybrid: every other layer a gated short convolution instead of attention."""
    e = parts.e
    writer.add_head_count_kv([0 if i % 2 == 0 else e.n_head_kv for i in range(e.n_layer)])
    writer.add_shortconv_l_cache(3)
    parts.outside(tied=True, norm="token_embd_norm")
    for i in range(e.n_layer):
        parts.norms(i, "attn_norm", "ffn_norm")
        if i % 2:
            parts.attention(i)
            parts.norms(i, "attn_q_norm", "attn_k_norm", width=e.head)
        else:
            parts.plain(f"blk.{i}.shortconv.conv", e.n_embd, 3)
            parts.matrix(f"blk.{i}.shortconv.in_proj", 3 * e.n_embd, e.n_embd)
            parts.matrix(f"blk.{i}.shortconv.out_proj", e.n_embd, e.n_embd)
        parts.feed_forward(i)


def _granite_hybrid(writer: gguf.GGUFWriter, parts: _Parts) -> None:
    """Granite 4 H, a hybrid: Mamba 2 layers, every fourth one attention."""
    e, inner, state, heads = parts.e, 2 * parts.e.n_embd, 16, 8
    writer.add_head_count_kv([e.n_head_kv if i % 4 == 3 else 0 for i in range(e.n_layer)])
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_group_count(1)
    writer.add_ssm_time_step_rank(heads)
    for add, value in ((writer.add_logit_scale, 8.0), (writer.add_residual_scale, 0.22)):
        add(value)
    parts.outside(tied=True)
    for i in range(e.n_layer):
        parts.norms(i, "attn_norm", "ffn_norm")
        if i % 4 == 3:
            parts.attention(i)
        else:
            block = f"blk.{i}."
            parts.matrix(f"{block}ssm_in", 2 * inner + 2 * state + heads, e.n_embd)
            parts.plain(f"{block}ssm_conv1d", inner + 2 * state, 4)
            parts.plain(f"{block}ssm_conv1d", inner + 2 * state, suffix=".bias")
            parts.plain(f"{block}ssm_dt", heads, suffix=".bias")
            parts.plain(f"{block}ssm_a", heads, 1, suffix="")
            parts.plain(f"{block}ssm_d", heads, 1, suffix="")
            parts.plain(f"{block}ssm_norm", 1, inner)
            parts.matrix(f"{block}ssm_out", e.n_embd, inner)
        parts.feed_forward(i)


_FAMILIES: dict[Family, Callable[[gguf.GGUFWriter, _Parts], None]] = {
    **dict.fromkeys(("llama", "llama-tied", "mixtral", "qwen2", "qwen3", "qwen3moe"), _transformer),
    **dict.fromkeys(("gemma", "granite", "qwen2moe"), _transformer),
    **dict.fromkeys(("gemma2", "gemma3"), _gemma),
    "phi3": _phi3,
    "olmo2": _olmo2,
    "starcoder2": _starcoder2,
    "lfm2": _lfm2,
    "granitehybrid": _granite_hybrid,
}
