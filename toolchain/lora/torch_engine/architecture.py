"""What a GGUF says of its architecture, as the transformers configuration that computes the same function.

The yardstick is llama.cpp commit 0c1e570: which keys it reads, what it takes where one is missing, and what it does
not read at all (src/llama-model.cpp, load_hparams, and src/models/ARCHITECTURE.cpp, load_arch_hparams). transformers
maps some of these keys itself (integrations/ggml.py) and forgets others, such as scaled rotary positions and the size
of heads; so the whole mapping is here, and the tests hold it against llama.cpp's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader
from toolchain.lora.torch_engine.positions import OTHER_BASE, head_dim, number, rotary, trained_context
from toolchain.lora.torch_engine.weights_file import WeightsFile


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one ``general.architecture`` of a GGUF is read.

    ``values`` names what the converter did to the values (row orders, norms): an entry of transformers'
    TENSOR_PROCESSORS. ``keys`` are those beyond the common ones, ``more`` is computed from header and tensors.
    ``attention`` is transformers' implementation: only the eager one caps the logits of attention.
    """

    model_type: str
    values: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[WeightsFile], dict[str, Any]] = lambda file: {}
    attention: str = "sdpa"
    partial_rotary: bool = False


def find_architecture(header: GgufHeader) -> Architecture:
    """UsageError where transformers or this program cannot compute the model."""
    name = header.architecture
    if name == "llama" and header.arch_int("expert_count"):
        return ARCHITECTURES["llama (experts)"]
    if name not in ARCHITECTURES:
        able = ", ".join(sorted({key.split()[0] for key in ARCHITECTURES}))
        raise UsageError(
            f"models of the architecture {name or '(none named)'} cannot be trained by the torch engine",
            evidence=f"those that can: {able}",
            hint=OTHER_BASE,
        )
    return ARCHITECTURES[name]


def model_config(file: WeightsFile) -> PreTrainedConfig:
    """The configuration of the model in ``file``."""
    header, tensors = file.first, file.tensors
    architecture = find_architecture(header)
    if "token_embd.weight" not in tensors:
        raise UsageError(f"{header.path.name} has no token_embd.weight", hint="name the first shard of a whole model")
    values: dict[str, Any] = {
        "vocab_size": tensors["token_embd.weight"].shape[1],
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": False,
        "pad_token_id": None,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "head_dim": head_dim(header),
        "rope_parameters": rotary(file, partial=architecture.partial_rotary),
    }
    values.update({f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _TOKENS})
    for suffix, name in {**_COMMON, **architecture.keys}.items():
        value = header.metadata.get(f"{header.architecture}.{suffix}")
        if isinstance(value, memoryview) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int | float):
            values[name] = value
    values.update(architecture.more(file))
    try:
        return AutoConfig.for_model(architecture.model_type, **values)
    except StrictDataclassError as error:
        what = f"transformers has no {architecture.model_type} of the sizes that {header.path.name} tells"
        raise UsageError(what, evidence=str(error), hint=OTHER_BASE) from error


_TOKENS: Final = ("bos", "eos")  # where the file names none, the configuration's own would be another model's
_COMMON: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def _layer_types(header: GgufHeader, period: int) -> list[str]:
    """Which layers see a window only: by the file's pattern, else each but the last of every ``period``."""
    n_layer = header.n_layer or 0
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern", period)
    if isinstance(pattern, memoryview):
        windowed = [bool(item) for item in pattern]
    else:
        every = int(pattern) if isinstance(pattern, int) else period
        windowed = [every == 0 or i % every < every - 1 for i in range(n_layer)]
    return ["sliding_attention" if seen else "full_attention" for seen in windowed]


def _gemma_scale(header: GgufHeader, layers_of_27b: int) -> int:
    """``query_pre_attn_scalar``: a head's width, or in the 27B models the embedding's share of a head."""
    if header.n_layer == layers_of_27b:
        return (header.arch_int("embedding_length") or 0) // (header.arch_int("attention.head_count") or 1)
    return head_dim(header)


def _gemma2(file: WeightsFile) -> dict[str, Any]:
    header = file.first
    return {
        "layer_types": _layer_types(header, 2),
        "sliding_window": header.arch_int("attention.sliding_window") or 4096,
        "query_pre_attn_scalar": _gemma_scale(header, 46),
        "attn_logit_softcapping": number(header, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": number(header, "final_logit_softcapping", 30.0),
    }


def _gemma3(file: WeightsFile) -> dict[str, Any]:
    header = file.first
    window = header.arch_int("attention.sliding_window")
    theta = number(header, "rope.freq_base_swa", 10000.0)
    return {
        "layer_types": _layer_types(header, 6) if window else ["full_attention"] * (header.n_layer or 0),
        "sliding_window": window,
        "query_pre_attn_scalar": _gemma_scale(header, 62),
        "final_logit_softcapping": number(header, "final_logit_softcapping", 0.0) or None,
        "rope_parameters": {
            "full_attention": rotary(file),
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def _granite(file: WeightsFile) -> dict[str, Any]:
    header = file.first
    if header.metadata.get("granite.rope.scaling.finetuned") is False:
        raise UsageError("Granite without rotary positions cannot be trained by the torch engine", hint=OTHER_BASE)
    return {
        "logits_scaling": number(header, "logit_scale", 1.0),
        "residual_multiplier": number(header, "residual_scale", 0.0) or 1.0,
        "embedding_multiplier": number(header, "embedding_scale", 0.0) or 1.0,
        "attention_multiplier": number(header, "attention.scale", 0.0) or head_dim(header) ** -0.5,
    }


def _phi3(file: WeightsFile) -> dict[str, Any]:
    """llama.cpp leaves Phi 3's sliding window out (pull request 13676), so the adapter is trained without it too."""
    header = file.first
    return {"sliding_window": None, "original_max_position_embeddings": trained_context(header)}


def _olmo2(file: WeightsFile) -> dict[str, Any]:
    if file.first.arch_int("attention.sliding_window"):
        what = "OLMo 3 (OLMo 2 with a sliding window) cannot be trained by the torch engine"
        raise UsageError(what, hint=OTHER_BASE)
    return {}


def _starcoder2(file: WeightsFile) -> dict[str, Any]:
    return {"use_bias": "blk.0.attn_q.bias" in file.tensors, "sliding_window": None}


def _lfm2(file: WeightsFile) -> dict[str, Any]:
    header = file.first
    if header.arch_int("attention.sliding_window"):
        raise UsageError("LFM2 with a sliding window cannot be trained by the torch engine", hint=OTHER_BASE)
    heads = header.arch_ints("attention.head_count_kv") or ()
    return {
        "num_key_value_heads": max(heads, default=0),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": any("shortconv" in name and name.endswith(".bias") for name in file.tensors),
    }


def _mixture(file: WeightsFile) -> dict[str, Any]:
    """The width of an expert is that of its tensors: headers name it under several keys, or not at all."""
    down, shared = (file.tensors.get(f"blk.0.ffn_down_{part}.weight") for part in ("exps", "shexp"))
    if down is None:
        what = f"{file.first.path.name}: the first layer has no experts in one tensor; such mixtures are not known"
        raise UsageError(what, hint=OTHER_BASE)
    sizes = {"moe_intermediate_size": down.shape[0]}
    return sizes | ({"shared_expert_intermediate_size": shared.shape[0]} if shared else {})


def _mixtral(file: WeightsFile) -> dict[str, Any]:
    return {"intermediate_size": _mixture(file)["moe_intermediate_size"], "sliding_window": None}


_EXPERTS: Final = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_MIXTRAL: Final = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture(model_type="llama", values="llama"),
    "llama (experts)": Architecture(model_type="mixtral", values="llama", keys=_MIXTRAL, more=_mixtral),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen2moe": Architecture(model_type="qwen2_moe", values="qwen2moe", keys=_EXPERTS, more=_mixture),
    "qwen3": Architecture(model_type="qwen3"),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        keys=_EXPERTS,
        more=lambda file: {**_mixture(file), "norm_topk_prob": True},
    ),
    "gemma": Architecture(model_type="gemma", values="gemma2"),
    "gemma2": Architecture(model_type="gemma2", values="gemma2", more=_gemma2, attention="eager"),
    "gemma3": Architecture(model_type="gemma3_text", values="gemma3", more=_gemma3),
    "phi3": Architecture(model_type="phi3", more=_phi3, partial_rotary=True),
    "granite": Architecture(model_type="granite", values="llama", more=_granite),
    "olmo2": Architecture(model_type="olmo2", more=_olmo2),
    "starcoder2": Architecture(
        model_type="starcoder2", keys={"attention.layer_norm_epsilon": "norm_epsilon"}, more=_starcoder2
    ),
    "lfm2": Architecture(
        model_type="lfm2",
        values="lfm2",
        keys={"shortconv.l_cache": "conv_L_cache", "attention.layer_norm_rms_epsilon": "norm_eps"},
        more=_lfm2,
    ),
}
