"""Bytes of the compute buffers: the worst-case graph of a context, scheduled and packed as the library would.

The method is that of llama_context::sched_reserve (src/llama-context.cpp, llama.cpp 0c1e570): a prompt's micro-batch
over a full cache, then one token for each sequence; each buffer is as large as the larger of the two asks for. All
layers are built for the first: which blocks are free after one layer decides where the next one's tensors go. The
second is hardly ever the larger one, and has the layers that repeat a few times only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from runtime.memory.allocator import buffer_sizes
from runtime.memory.blocks import EXACT, build
from runtime.memory.building import Pass
from runtime.memory.cache import cells, micro_batch
from runtime.memory.graph import Tensor, row_bytes
from runtime.memory.placement import HOST_ALIGNMENT, Demand, Placement, Traits, layer_devices
from runtime.memory.scheduler import schedule
from runtime.memory.shape import Headers, ModelShape, shape_of

ESTIMATE_MARGIN: Final = 1.25
"""On compute buffers of architectures whose graph is only the general form of theirs."""

_FEW_QUERIES: Final = 2  # up to so many tokens flash attention reads the cache as it is (ggml-cuda/fattn.cu)
_LONGEST_PATTERN: Final = 8  # layers; the longest that any architecture repeats (Plamo 3)


@dataclass(frozen=True, kw_only=True)
class ComputeBytes:
    """One device's buffer; ``output`` bytes of it are logits, where the output layer is computed.

    That may be GPU 0 for a prompt and the host for a reply when the layer's weights are on the host.
    """

    total: int
    output: int


def compute_bytes(
    headers: Headers, demand: Demand, placement: Placement, n_devices: int, traits: Traits
) -> tuple[ComputeBytes, ...]:
    """On the host and on each GPU."""
    return _compute(shape_of(headers), demand, placement, n_devices, traits)


def is_exact(shape: ModelShape) -> bool:
    """Whether the graph is the library's, node for node.

    So its buffers are exact on the host and on devices that take a graph as it is. What a GPU's backend adds of its own
    (fused operations, scratch space in a result) is as CUDA's source tells it, in ``Traits``, and not measured.
    """
    return shape.architecture in EXACT and all(layer.is_recurrent or layer.n_head_kv for layer in shape.layers)


def n_outputs(shape: ModelShape, demand: Demand) -> int:
    """Rows of logits of one micro-batch."""
    rows = demand.n_outputs_max or min(demand.n_ctx or shape.n_ctx_train, demand.n_batch)
    return min(_tokens(shape, demand), rows)


@lru_cache(maxsize=4096)
def _compute(
    shape: ModelShape, demand: Demand, placement: Placement, n_devices: int, traits: Traits
) -> tuple[ComputeBytes, ...]:
    devices = layer_devices(shape, placement, n_devices)
    prompt = (_tokens(shape, demand), n_outputs(shape, demand))
    every = tuple(range(shape.n_layer))
    passes = [(*prompt, every)]
    if n_devices:
        passes.append((demand.n_seq_max, demand.n_seq_max, _few_layers(shape, placement, devices)))
    sizes, outputs = [0] * (n_devices + 1), [0] * (n_devices + 1)
    for tokens, rows, layers in passes:
        job = Pass(
            shape=shape,
            demand=demand,
            placement=placement,
            devices=devices,
            n_gpus=n_devices,
            n_tokens=-(-tokens // demand.n_seq_max) * demand.n_seq_max,
            n_outputs=rows,
            layers=layers,
        )
        found, logits = _reserve(job, traits)
        sizes = [max(size, other) for size, other in zip(sizes, found, strict=True)]
        outputs[logits.backend] = max(outputs[logits.backend], logits.nbytes)  # -1, the last: the CPU
    if not is_exact(shape):
        sizes = [int(size * ESTIMATE_MARGIN) for size in sizes]
    made = [ComputeBytes(total=size, output=output) for size, output in zip(sizes, outputs, strict=True)]
    return (made[-1], *made[:-1])


def _reserve(job: Pass, traits: Traits) -> tuple[tuple[int, ...], Tensor]:
    """Bytes of each backend's buffer (the GPUs first, the CPU last), and the tensor of logits."""
    graph, logits = build(job)
    full = job.placement.n_gpu_layers < 0 or job.placement.n_gpu_layers > job.shape.n_layer_all
    pipeline = traits.pipelines and job.n_gpus > 1 and full and job.placement.offload_kqv
    pipeline = pipeline and not job.placement.cpu_expert_layers
    plan = schedule(graph, job.n_gpus, offload_rows=traits.offload_rows, pipeline=pipeline, fuses=traits.fuses)
    alignments = (*(traits.alignment,) * job.n_gpus, HOST_ALIGNMENT)

    def size_of(tensor: Tensor, backend: int) -> int:
        if backend == job.n_gpus:
            return tensor.nbytes
        if traits.widens_cache and tensor.op == "FLASH_ATTN_EXT" and tensor.ne[2] > _FEW_QUERIES:
            wide = [2 * operand.n_elements for operand in tensor.src[1:3] if operand.kind != "F16"]
            return sum((-(-size // 128) * 128 for size in wide), start=-(-tensor.nbytes // 128) * 128)
        if traits.row_padding and tensor.is_quantized and tensor.ne[0] % traits.row_padding:
            return tensor.nbytes + row_bytes(tensor.kind, -tensor.ne[0] % traits.row_padding)
        return tensor.nbytes

    return buffer_sizes(plan.nodes, plan.leafs, alignments, size_of), logits


def _few_layers(shape: ModelShape, placement: Placement, devices: tuple[int, ...]) -> tuple[int, ...]:
    """Layers enough for a graph of one token: of runs and patterns that repeat, pairs of repeats are left out."""
    layers = [(index, _kind(shape, placement, devices, index)) for index in range(shape.n_layer)]
    for period in range(1, _LONGEST_PATTERN + 1):
        at = 0
        while at + 6 * period <= len(layers):
            first, second = layers[at : at + 4 * period], layers[at + 2 * period : at + 6 * period]
            if all(one == other for (_, one), (_, other) in zip(first, second, strict=True)):
                del layers[at : at + 2 * period]
            else:
                at += 1
    return tuple(index for index, _ in layers)


def _kind(shape: ModelShape, placement: Placement, devices: tuple[int, ...], index: int) -> tuple[object, ...]:
    """Layers of one kind have the same graph."""
    layer = shape.layers[index]
    return (
        devices[index],
        placement.keeps_experts(index) and "ffn_gate_inp.weight" in layer.tensors,
        shape.n_expert_used[index],
        layer.kind,
    )


def _tokens(shape: ModelShape, demand: Demand) -> int:
    base, _swa, streams = cells(shape, demand)
    return min(base * streams, micro_batch(shape, demand))
