"""What decides a model's memory: its extents, layer by layer, read from the header's metadata and tensor list.

The rules are those of load_hparams and of each architecture's load_arch_hparams in llama.cpp 0c1e570
(src/llama-model.cpp, src/models/). Where an architecture's files differ, the tensors tell more than the metadata: a
layer is recurrent when it has a state-space or convolution tensor, and has attention when it has keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Final, TypeAlias

from toolchain.base.gguf_header import GgufHeader, TensorInfo

Headers: TypeAlias = "GgufHeader | Sequence[GgufHeader]"


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerShape:
    """One layer. Extents are elements; ``window`` is 0 where attention reaches over the whole context."""

    n_head: int
    n_head_kv: int
    head_k: int
    head_v: int
    window: int
    has_attention: bool
    is_recurrent: bool
    owns_kv: bool
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """Equal for layers with the same graph."""
        tensors = tuple((name, info.shape) for name, info in sorted(self.tensors.items()))
        return (self.n_head, self.n_head_kv, self.head_k, self.head_v, self.window > 0, self.is_recurrent, tensors)

    @property
    def k_width(self) -> int:
        return self.head_k * self.n_head_kv if self.owns_kv else 0

    @property
    def v_width(self) -> int:
        return self.head_v * self.n_head_kv if self.owns_kv else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelShape:
    """The whole model. ``n_layer`` layers are run; ``n_layer_all`` counts those that only predict drafts too.

    ``state_r`` and ``state_s`` are the f32 elements that one recurrent layer keeps for each sequence. ``key_only``
    says that keys hold the values too (MLA). ``tensors`` are those outside the layers, by name without ``.weight``.
    """

    architecture: str
    n_layer: int
    n_layer_all: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_expert: int
    n_expert_used: tuple[int, ...]
    state_r: int
    state_s: int
    key_only: bool
    has_windows: bool
    layers: tuple[LayerShape, ...] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    final_soft_cap: bool
    attention_soft_cap: bool
    residual_scale: bool
    embedding_scale: bool
    logit_scale: bool
    expert_scale: bool
    has_rope: bool
    norm_op: str

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the token embedding, a second time."""
        return "output" not in self.tensors


def shape_of(headers: Headers) -> ModelShape:
    """The shape of a model, from the header of its file or those of all its shards, the first one first."""
    parts = (headers,) if isinstance(headers, GgufHeader) else tuple(headers)
    return _shape_of(_ByIdentity(parts))


def all_tensors(headers: Headers) -> tuple[TensorInfo, ...]:
    if isinstance(headers, GgufHeader):
        return headers.tensors
    return tuple(tensor for header in headers for tensor in header.tensors)


LAYER_TENSOR: Final = re.compile(r"blk\.(\d+)\.(.+)")

# architecture -> (every so many layers one reaches over the whole context, the first of them, default window)
_WINDOWS: Final[Mapping[str, tuple[int, bool, int]]] = {
    "afmoe": (4, False, 0),
    "cohere2": (4, False, 0),
    "cohere2moe": (4, True, 0),
    "exaone-moe": (4, False, 128),
    "exaone4": (4, False, 0),
    "gemma2": (2, False, 4096),
    "gemma3": (6, False, 0),
    "gemma3n": (5, False, 0),
    "gemma4": (6, False, 0),
    "gpt-oss": (2, False, 0),
    "llama4": (4, False, 8192),
    "mellum": (4, False, 0),
    "mimo2": (1, False, 0),
    "olmo2": (4, False, 0),
    "plamo3": (8, False, 0),
    "smallthinker": (4, True, 4096),
    "step35": (1, False, 0),
}
_KEYS: Final = ("attn_k.weight", "attn_qkv.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight")
_STATES: Final = ("ssm_conv1d.weight", "ssm_a", "shortconv.conv.weight", "time_mix_w1.weight", "ssm_conv1d_q.weight")


@dataclass(frozen=True, eq=False)
class _ByIdentity:
    """Headers as a cache's key: the same objects, not equal ones (comparing them would cost more than reading)."""

    parts: tuple[GgufHeader, ...]

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.parts)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and [*map(id, self.parts)] == [*map(id, other.parts)]


@lru_cache(maxsize=64)
def _shape_of(key: _ByIdentity) -> ModelShape:
    header = key.parts[0]
    by_layer: dict[int, dict[str, TensorInfo]] = {}
    outside: dict[str, TensorInfo] = {}
    for tensor in all_tensors(key.parts):
        if found := LAYER_TENSOR.fullmatch(tensor.name):
            by_layer.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            outside[tensor.name.removesuffix(".weight")] = tensor
    n_layer_all = header.n_layer or 0
    n_layer = n_layer_all - (header.arch_int("nextn_predict_layers") or 0)
    embedding = outside.get("token_embd")
    windows = _windows(header, n_layer_all)
    state_r, state_s = _states(header)
    used = header.arch_ints("expert_used_count") or ()
    plain_norm = _number(header, "attention.layer_norm_epsilon")
    finetuned = f"{header.architecture}.rope.scaling.finetuned"  # which for Granite switches positions on or off
    return ModelShape(
        architecture=header.architecture,
        n_layer=n_layer,
        n_layer_all=n_layer_all,
        n_embd=header.arch_int("embedding_length") or 0,
        n_vocab=header.n_vocab or (embedding.shape[1] if embedding else 0),
        n_ctx_train=header.n_ctx_train or 0,
        n_expert=header.arch_int("expert_count") or 0,
        n_expert_used=tuple(used[i] if i < len(used) else 0 for i in range(n_layer_all)),
        state_r=state_r,
        state_s=state_s,
        key_only=bool(header.arch_int("attention.key_length_mla")),
        has_windows=any(windows),
        layers=tuple(_layer(header, i, by_layer.get(i, {}), windows[i]) for i in range(n_layer_all)),
        tensors=outside,
        final_soft_cap=_number(header, "final_logit_softcapping") != 0 or header.architecture == "gemma2",
        attention_soft_cap=_number(header, "attn_logit_softcapping") != 0 or header.architecture == "gemma2",
        residual_scale=_number(header, "residual_scale") != 0,
        embedding_scale=_number(header, "embedding_scale") != 0,
        logit_scale=_number(header, "logit_scale") != 0,
        expert_scale=_number(header, "expert_weights_scale") not in (0.0, 1.0),
        has_rope=not (header.architecture.startswith("granite") and header.metadata.get(finetuned) is False),
        norm_op="RMS_NORM" if _number(header, "attention.layer_norm_rms_epsilon") or not plain_norm else "NORM",
    )


def _layer(header: GgufHeader, index: int, tensors: Mapping[str, TensorInfo], window: int) -> LayerShape:
    n_head = _at(header.arch_ints("attention.head_count"), index)
    kv_heads = header.arch_ints("attention.head_count_kv")
    n_head_kv = n_head if kv_heads is None else _at(kv_heads, index)
    width = (header.arch_int("embedding_length") or 0) // max(1, _at(header.arch_ints("attention.head_count"), 0))
    head_k = header.arch_int("attention.key_length") or width
    head_v = header.arch_int("attention.value_length") or width
    if window:
        head_k = header.arch_int("attention.key_length_swa") or head_k
        head_v = header.arch_int("attention.value_length_swa") or head_v
    is_recurrent = any(name in tensors for name in _STATES)
    has_keys = any(name in tensors for name in _KEYS) or not tensors
    interval = header.arch_int("full_attention_interval")
    if interval and not tensors:  # a header that is described rather than read
        is_recurrent = (index + 1) % interval != 0
    has_heads = bool(n_head_kv and max(header.arch_ints("attention.head_count") or (0,)))
    has_attention = has_heads and has_keys and (not is_recurrent or header.architecture == "falcon-h1")
    first_shared = (header.n_layer or 0) - (header.arch_int("attention.shared_kv_layers") or 0)
    if header.architecture == "gemma3n":
        first_shared = 20
    drafts = header.arch_int("nextn_predict_layers") or 0
    return LayerShape(
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_k=head_k,
        head_v=head_v,
        window=window,
        has_attention=has_attention,
        is_recurrent=is_recurrent,
        owns_kv=has_attention and index < first_shared and index < (header.n_layer or 0) - drafts,
        tensors=tensors,
    )


def _windows(header: GgufHeader, n_layer: int) -> tuple[int, ...]:
    """The attention window of each layer, 0 for the whole context."""
    every, dense_first, default = _WINDOWS.get(header.architecture, (0, False, 0))
    window = header.arch_int("attention.sliding_window") or default
    if not every and not (header.architecture == "lfm2" and window):
        return (0,) * n_layer
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, memoryview):
        return tuple(window if i < len(pattern) and pattern[i] else 0 for i in range(n_layer))
    if type(pattern) is int:
        every = pattern
    if not every:
        return (window,) * n_layer
    kept = 0 if dense_first else every - 1
    return tuple(0 if i % every == kept else window for i in range(n_layer))


def _states(header: GgufHeader) -> tuple[int, int]:
    """(n_embd_r, n_embd_s) of src/llama-hparams.cpp."""
    width, n_head = header.arch_int("embedding_length") or 0, _at(header.arch_ints("attention.head_count"), 0)
    kernel, inner = header.arch_int("ssm.conv_kernel") or 0, header.arch_int("ssm.inner_size") or 0
    state = header.arch_int("ssm.state_size") or 0
    if head := header.arch_int("wkv.head_size"):
        return (header.arch_int("token_shift_count") or 2) * width, width * head
    if length := header.arch_int("shortconv.l_cache"):
        return width * (length - 1), state * inner
    if head := header.arch_int("kda.head_dim"):
        return 3 * (kernel - 1 if kernel else 3) * n_head * head, head * head * n_head
    groups = header.arch_int("ssm.group_count") or 0
    return max(0, kernel - 1) * (inner + 2 * groups * state), state * inner


def _at(values: tuple[int, ...] | None, index: int) -> int:
    return values[index] if values and index < len(values) else 0


def _number(header: GgufHeader, suffix: str) -> float:
    value = header.metadata.get(f"{header.architecture}.{suffix}")
    return float(value) if isinstance(value, int | float) else 0.0
