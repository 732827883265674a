"""Layers on several GPUs and experts on the host, as the library's parameters say it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, Final

from runtime.settings import Settings, parse_split

_EXPERTS: Final = r"blk\.(%s)\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""The experts of layers, as llama.cpp's --n-cpu-moe names them (LLM_FFN_EXPS_REGEX in common/common.h)."""


class TensorOverride(ctypes.Structure):
    """``llama_model_tensor_buft_override`` in llama.h, which the bindings leave out."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


def apply_placement(lib: Any, params: Any, settings: Settings) -> object:
    """Set ``n_gpu_layers``, ``tensor_split`` and ``tensor_buft_overrides`` of ``params`` (llama_model_params).

    What is returned is the memory that ``params`` points at: keep it until the model is loaded.
    """
    params.n_gpu_layers = settings.number("n_gpu_layers")
    kept: list[object] = []
    if shares := parse_split(settings.text("tensor_split")):
        most = lib.llama_max_devices()
        split = (ctypes.c_float * most)(*shares[:most])
        params.tensor_split = ctypes.cast(split, type(params.tensor_split))
        kept.append(split)
    kept.append(keep_experts(lib, params, range(settings.number("n_cpu_moe"))))
    return kept


def keep_experts(lib: Any, params: Any, layers: Iterable[int]) -> object:
    """Point ``params`` at the rule that keeps the experts of ``layers`` on the host; keep what is returned as above."""
    numbers = "|".join(map(str, sorted(layers)))
    if not numbers:
        return None
    library = ctypes.CDLL(lib._lib._name)
    library.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    named = TensorOverride((_EXPERTS % numbers).encode(), library.ggml_backend_cpu_buffer_type())
    rules = (TensorOverride * 2)(named, TensorOverride(None, None))
    params.tensor_buft_overrides = ctypes.cast(rules, ctypes.c_void_p)
    return rules
