"""Sizes of heads and rotary positions of a GGUF, in the terms of a transformers configuration.

As llama.cpp commit 0c1e570 reads them: load_hparams of src/llama-model.cpp, the constructor in src/llama-context.cpp.
"""

from __future__ import annotations

import math
from typing import Any, Final

from torch import nn

from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader
from toolchain.lora.torch_engine.weights_file import WeightsFile

OTHER_BASE: Final = "choose another base"
_LARGEST_HEAD: Final = 2**14
"""Values in a head; far above any model's, and a bound for the tables that are computed from a header alone."""


def number(header: GgufHeader, suffix: str, default: float) -> float:
    """The number under ``<architecture>.<suffix>``."""
    value = header.metadata.get(f"{header.architecture}.{suffix}")
    return float(value) if isinstance(value, int | float) else default


def trained_context(header: GgufHeader) -> int:
    """Tokens of context before positions were stretched."""
    return header.arch_int("rope.scaling.original_context_length") or header.n_ctx_train or 0


def head_dim(header: GgufHeader) -> int:
    """Values in each head; keys and values must have the same number."""
    heads = header.arch_ints("attention.head_count")
    width = header.arch_int("embedding_length")
    if not heads or not width or min(heads) < 1:
        raise UsageError(f"{header.path.name} does not say how many heads it has", hint=OTHER_BASE)
    sizes = {header.arch_int(f"attention.{part}_length") or width // heads[0] for part in ("key", "value")}
    if len(sizes) > 1 or not 0 < min(sizes) <= _LARGEST_HEAD:
        what = f"heads of {' and '.join(map(str, sorted(sizes)))} values cannot be trained by the torch engine"
        raise UsageError(what, hint=OTHER_BASE)
    return sizes.pop()


def rotary(file: WeightsFile, *, partial: bool = False) -> dict[str, Any]:
    """The ``rope_parameters`` of a configuration; ``partial``: whether the model can rotate a part of each head."""
    header = file.first
    width = head_dim(header)
    rotated = header.arch_int("rope.dimension_count") or width
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": number(header, "rope.freq_base", 10000.0)}
    if partial:
        rope["partial_rotary_factor"] = rotated / width
    elif rotated != width:
        what = f"{header.architecture} with {rotated} of {width} values of a head rotated is not known"
        raise UsageError(what, hint=OTHER_BASE)
    factor = number(header, "rope.scaling.factor", number(header, "rope.scale_linear", 0.0)) or 1.0
    stretched = {"factor": factor, "original_max_position_embeddings": trained_context(header)}
    scale = number(header, "rope.scaling.attn_factor", 1.0)
    match header.text(f"{header.architecture}.rope.scaling.type") or "linear":
        case _ if "rope_factors_short.weight" in file.tensors:
            rope |= {**stretched, "rope_type": "longrope", "attention_factor": scale}
            for part in ("short", "long"):
                rope[f"{part}_factor"] = (file.floats(f"rope_factors_{part}.weight") * factor).tolist()
        case "yarn":
            beta = {name: number(header, f"rope.scaling.yarn_{name}", known) for name, known in _YARN.items()}
            rope |= {**stretched, **beta, "rope_type": "yarn", "attention_factor": scale * _yarn_scale(factor)}
        case "linear" if factor != 1.0:
            rope |= {"rope_type": "linear", "factor": factor}
        case "linear" | "none" | "longrope":
            pass
        case other:
            raise UsageError(f"rotary positions scaled by {other} are not known", hint=OTHER_BASE)
    return rope


_YARN: Final = {"beta_fast": 32.0, "beta_slow": 1.0}


def _yarn_scale(factor: float) -> float:
    """By how much YaRN (arXiv 2309.00071) scales the products of queries and keys, its square root."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def divide_frequencies(model: nn.Module, file: WeightsFile) -> None:
    """Divide the model's rotary frequencies by the file's own factors, as ggml_rope_ext does (Llama 3.1 and later)."""
    if "rope_freqs.weight" not in file.tensors:
        return
    factors = file.floats("rope_freqs.weight")
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if (frequencies := module._buffers.get(name)) is not None:
                module._buffers[name] = frequencies / factors
