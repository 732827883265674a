"""Bytes of weights on each device, as the loader's buffers would be without mmap.

What counts as a tensor's bytes is what its buffer type allocates: its data, padded to the device's alignment, on CUDA
also to whole rows of 512 elements. With mmap the host's weights are pages of the file, the same bytes give or take the
file's own alignment, and the loader then prints the mapped range of the file ("CPU_Mapped"), which on a split placement
also spans tensors that lie on a GPU. The rules are those of llama_model_loader::create_tensor and the
architectures' load_arch_tensors in llama.cpp 0c1e570: the embedding stays on the host, an output layer tied to it is a
copy of its own unless both are in the same buffer, layers that only predict drafts are not loaded.

Known to differ: an AMX build lays some types out with other sizes (ggml-cpu/amx); Gemma 4's per-layer embedding beyond
4 GiB is read on demand where it can be and counts here in full; tensors that an architecture ignores count here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from runtime.memory.graph import row_bytes
from runtime.memory.placement import HOST_ALIGNMENT, Placement, Traits, layer_devices
from runtime.memory.shape import LAYER_TENSOR, Headers, ModelShape, all_tensors, shape_of
from toolchain.base.gguf_header import TensorInfo

EXPERTS: Final = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps")  # LLM_FFN_EXPS_REGEX in common/common.h


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes on one device; ``experts`` are part of ``total``."""

    total: int = 0
    experts: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Bytes of one layer as they lie in the file's types, unpadded but for the host's alignment."""

    dense: int
    experts: int


def weight_bytes(headers: Headers, placement: Placement, n_devices: int, traits: Traits) -> tuple[WeightBytes, ...]:
    """Bytes on the host and on each GPU."""
    shape = shape_of(headers)
    devices = layer_devices(shape, placement, n_devices)
    total, experts = [0] * (n_devices + 1), [0] * (n_devices + 1)
    for tensor in all_tensors(headers):
        for device in _places(tensor, shape, devices):
            is_expert = EXPERTS.search(tensor.name) is not None
            home = 0 if is_expert and placement.keeps_experts(_layer_of(tensor) or 0) else device
            size = allocated_bytes(tensor, home, traits)
            total[home] += size
            experts[home] += size * is_expert
    tied = shape.tensors.get("token_embd")
    if shape.is_tied and tied is not None:
        device = devices[-1]
        if device or _is_rearranged(tied, n_devices, traits):
            total[device] += allocated_bytes(tied, device, traits)
    return tuple(WeightBytes(total=t, experts=e) for t, e in zip(total, experts, strict=True))


def layer_weights(headers: Headers) -> tuple[LayerWeights, ...]:
    """Of each layer; those that only predict drafts have none."""
    shape = shape_of(headers)
    rows = []
    for index, layer in enumerate(shape.layers):
        sizes = {True: 0, False: 0}
        for tensor in layer.tensors.values() if index < shape.n_layer else ():
            sizes[EXPERTS.search(tensor.name) is not None] += _padded(tensor.nbytes, HOST_ALIGNMENT)
        rows.append(LayerWeights(dense=sizes[False], experts=sizes[True]))
    return tuple(rows)


def output_layer_bytes(headers: Headers) -> int:
    """What moves with the output layer, the tied embedding's copy included."""
    shape = shape_of(headers)
    names = [name for name in shape.tensors if _is_output(name, shape)]
    if shape.is_tied and "token_embd" in shape.tensors:
        names.append("token_embd")
    return sum(_padded(shape.tensors[name].nbytes, HOST_ALIGNMENT) for name in names)


def allocated_bytes(tensor: TensorInfo, device: int, traits: Traits) -> int:
    """What a buffer on ``device`` gives the tensor."""
    if not device:
        return _padded(tensor.nbytes, HOST_ALIGNMENT)
    size, missing = tensor.nbytes, -tensor.shape[0] % traits.row_padding if traits.row_padding else 0
    if missing and tensor.type not in ("F32", "F16", "BF16", "I32"):
        size += row_bytes(tensor.type, missing)
    return _padded(size, traits.alignment)


def _places(tensor: TensorInfo, shape: ModelShape, devices: tuple[int, ...]) -> tuple[int, ...]:
    """The devices that hold a tensor; rope factors lie on every device with a layer."""
    layer = _layer_of(tensor)
    if layer is not None:
        return (devices[layer],) if layer < shape.n_layer else ()
    name = tensor.name.removesuffix(".weight")
    if name in ("rope_freqs", "rope_factors_long", "rope_factors_short"):
        return tuple(sorted(set(devices[: shape.n_layer])))
    if _is_output(name, shape):
        return (devices[-1],)
    if name.startswith("token_embd_norm") or name.startswith("per_layer_proj") or name == "per_layer_model_proj":
        return (devices[0],)  # a part of the first layer, as llm_tensor_info has it
    return (0,)


def _is_output(name: str, shape: ModelShape) -> bool:
    if name == "token_embd_norm":
        return shape.architecture in ("lfm2", "lfm2moe")  # the output norm under a wrong name
    return name.startswith(("output", "cls", "dense_", "altup", "dec.output_norm", "enc.output_norm"))


def _is_rearranged(tied: TensorInfo, n_devices: int, traits: Traits) -> bool:
    """Whether the CPU wants the output layer in another buffer than the embedding, so that both are kept."""
    if n_devices and traits.host_buffer:
        return False  # host weights are not rearranged beside such a GPU; with mmap both are the same pages
    return tied.type in traits.repacked and tied.shape[1] % 8 == 0


def _layer_of(tensor: TensorInfo) -> int | None:
    found = LAYER_TENSOR.fullmatch(tensor.name)
    return int(found[1]) if found else None


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment
