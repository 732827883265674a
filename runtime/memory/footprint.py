"""What a model and a context take of each device's memory, from the header alone.

Weights and caches are exact to the buffers that the library allocates; compute buffers are those of the library's own
graph, packed by its own method, for the architectures that ``supported`` calls exact, and of the general form with a
margin of ``ESTIMATE_MARGIN`` for all others. Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.memory.cache import cache_bytes, layer_cache_bytes
from runtime.memory.compute import ESTIMATE_MARGIN, compute_bytes, is_exact
from runtime.memory.placement import CUDA, RPC, Demand, Placement, Traits, repacked_types
from runtime.memory.shape import Headers, shape_of
from runtime.memory.weights import LayerWeights, layer_weights, output_layer_bytes, weight_bytes
from toolchain.base.gguf_header import GgufHeader

__all__ = [
    "CUDA",
    "ESTIMATE_MARGIN",
    "RPC",
    "BufferBytes",
    "Demand",
    "LayerBytes",
    "ModelBytes",
    "Placement",
    "Traits",
    "adapter_bytes",
    "adapter_compute",
    "footprint",
    "layer_table",
    "mmproj_bytes",
    "repacked_types",
    "supported",
]


@dataclass(frozen=True, kw_only=True)
class BufferBytes:
    """Memory on one device. ``experts`` are part of ``weights``, ``output`` (the output layer's logits) of ``compute``.

    ``results`` is the host's copy of the logits ("output buffer" in the library's log, which its own breakdown of
    memory leaves out): vocabulary x rows x 4 bytes.
    """

    weights: int
    experts: int
    kv: int
    compute: int
    output: int
    results: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.results


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One layer: what moves with it from device to device. ``kv`` is keys, values and recurrent state."""

    dense: int
    experts: int
    kv: int


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """A model's parts. The input embedding stays on the host; the output layer moves as one more layer.

    ``output`` counts a tied embedding in full, although it costs nothing where both are on the host.
    """

    layers: tuple[LayerBytes, ...]
    input: int
    output: int


def footprint(
    header: Headers, demand: Demand, placement: Placement, n_devices: int, *, traits: Traits = CUDA
) -> tuple[BufferBytes, ...]:
    """Bytes on the host, then on each of ``n_devices`` GPUs in order.

    ``header`` is one header or those of all shards. Every call but the first with the same arguments is a look-up.
    """
    shape = shape_of(header)
    weights = weight_bytes(header, placement, n_devices, traits)
    kv = cache_bytes(header, demand, placement, n_devices, traits)
    compute = compute_bytes(header, demand, placement, n_devices, traits)
    rows = max(demand.n_seq_max, demand.n_outputs_max or min(demand.n_ctx or shape.n_ctx_train, demand.n_batch))
    return tuple(
        BufferBytes(
            weights=weights[device].total,
            experts=weights[device].experts,
            kv=kv[device],
            compute=compute[device].total,
            output=compute[device].output,
            results=0 if device else 4 * shape.n_vocab * rows,
        )
        for device in range(n_devices + 1)
    )


def layer_table(header: Headers, demand: Demand) -> ModelBytes:
    """Each layer's bytes, with those of the input embedding and the output layer apart."""
    weights, kv = layer_weights(header), layer_cache_bytes(header, demand)
    moved = output_layer_bytes(header)
    everything = weight_bytes(header, Placement(n_gpu_layers=0), 0, Traits())[0].total
    tied = shape_of(header).is_tied
    embedding = shape_of(header).tensors.get("token_embd")
    inside = sum(layer.dense + layer.experts for layer in weights)
    outside = everything - inside - moved + (embedding.nbytes if tied and embedding else 0)
    return ModelBytes(layers=tuple(map(_layer, weights, kv)), input=outside, output=moved)


def supported(header: Headers) -> Literal["exact", "estimated"]:
    """Whether the graph of this architecture is known node for node, or its general form is taken with a margin."""
    return "exact" if is_exact(shape_of(header)) else "estimated"


def mmproj_bytes(header: GgufHeader) -> int:
    """Weights of a multimodal projector, all on one device.

    Its compute buffer is not in it: it depends on the image, and is reserved for the largest one (tools/mtmd/clip.cpp).
    """
    return _file_bytes(header)


def adapter_bytes(header: GgufHeader) -> int:
    """Weights of a LoRA adapter; each pair lies on the device of the tensor that it changes (llama-adapter.cpp)."""
    return _file_bytes(header)


def adapter_compute(header: GgufHeader, n_ubatch: int, *, n_expert_used: int = 1) -> int:
    """What a LoRA adapter adds to a device's compute buffer at most, for a micro-batch of ``n_ubatch`` tokens.

    Each target adds a product of its rank, one of its width and their sum to the graph (build_lora_mm in
    llama-graph.cpp), which are free again before the next one: the widest counts, twice for what holes it leaves.
    """
    widest = 0
    for tensor in header.tensors:
        if tensor.name.endswith(".lora_b"):  # rank, width and, of experts, their number
            rank, width, *experts = tensor.shape
            widest = max(widest, (rank + width) * (n_expert_used if experts and experts[0] > 1 else 1))
    return 2 * widest * n_ubatch * 4


def _layer(weights: LayerWeights, kv: int) -> LayerBytes:
    return LayerBytes(dense=weights.dense, experts=weights.experts, kv=kv)


def _file_bytes(header: GgufHeader) -> int:
    return sum(-(-tensor.nbytes // CUDA.alignment) * CUDA.alignment for tensor in header.tensors)
