"""A layer under construction: its weights by name, the graph it goes into, and what all layers share.

After the small functions of src/llama-graph.cpp in llama.cpp 0c1e570: build_norm, build_lora_mm, the inputs of caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from runtime.memory import graph as g
from runtime.memory.cache import cells
from runtime.memory.graph import Graph, Tensor
from runtime.memory.placement import Demand, Placement
from runtime.memory.shape import LayerShape, ModelShape
from runtime.memory.weights import EXPERTS
from toolchain.base.errors import ArtifactError
from toolchain.base.gguf_header import TensorInfo

_PINNED_BELOW: Final = 32  # tokens: graph_get_cb in llama-context.cpp keeps norms on their layer's device


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One graph: ``layers`` are the numbers of those to build, ``devices`` the device of every layer and the output."""

    shape: ModelShape
    demand: Demand
    placement: Placement
    devices: tuple[int, ...]
    n_gpus: int
    n_tokens: int
    n_outputs: int
    layers: tuple[int, ...]


class Building:
    """The graph so far, and the inputs that its layers share."""

    def __init__(self, job: Pass) -> None:
        self.job, self.shape, self.demand = job, job.shape, job.demand
        self.graph = Graph()
        self.n_seqs = job.demand.n_seq_max
        self.base, self.swa, self.streams = cells(job.shape, job.demand)
        self.pins = bool(job.n_gpus) and (
            job.n_tokens < _PINNED_BELOW or not 0 <= job.placement.n_gpu_layers <= job.shape.n_layer_all
        )
        self.positions = g.graph_input("I32", job.n_tokens)
        states = g.graph_input("I32", max(1, self.n_seqs))
        self.main_states, self.spare_states = g.view(states, (self.n_seqs,), ()), g.view(states, (0,), ())
        self._caches: dict[bool, CacheInputs] = {}

    def weight(self, info: TensorInfo, device: int) -> Tensor:
        return g.held(info.type, info.shape, self.backend(device), weight=True)

    def backend(self, device: int) -> int:
        """Backends count the GPUs first and the CPU last."""
        return device - 1 if device else self.job.n_gpus

    def inputs_of(self, layer: LayerShape) -> CacheInputs:
        """Index, mask and rotation inputs that all layers of one cache share."""
        windowed = layer.window > 0
        if windowed not in self._caches:
            self._caches[windowed] = CacheInputs(self, windowed)
        return self._caches[windowed]


class Layer:
    """One layer: its shape, its device and its weights by name."""

    def __init__(self, building: Building, index: int) -> None:
        self.b, self.index = building, index
        self.shape = building.shape.layers[index]
        self.device = building.job.devices[index]
        self.n_tokens = building.job.n_tokens

    @property
    def architecture(self) -> str:
        return self.b.shape.architecture

    @property
    def cache_home(self) -> int:
        """The backend that holds the layer's keys, values and states."""
        return self.b.backend(self.device if self.b.job.placement.offload_kqv else 0)

    def norm(self, current: Tensor, name: str, *, pinned: bool = True) -> Tensor:
        current = g.like(self.b.shape.norm_op, current)
        if pinned and self.b.pins:
            current.backend = self.b.backend(self.device)
        current = g.like("MUL", current, self.weight(name))
        if self.has(name, suffix=".bias"):
            current = g.like("ADD", current, self.weight(name, suffix=".bias"))
        return current

    def linear(self, name: str, current: Tensor) -> Tensor:
        current = g.mul_mat(self.weight(name), current)
        if self.has(name, suffix=".bias"):
            current = g.like("ADD", current, self.weight(name, suffix=".bias"))
        return current

    def weight(self, name: str, *, suffix: str = ".weight") -> Tensor:
        away = EXPERTS.search(name) is not None and self.b.job.placement.keeps_experts(self.index)
        return self.b.weight(self.info(name, suffix=suffix), 0 if away else self.device)

    def has(self, name: str, *, suffix: str = ".weight") -> bool:
        return name + suffix in self.shape.tensors

    def info(self, name: str, *, suffix: str = ".weight") -> TensorInfo:
        found = self.shape.tensors.get(name + suffix)
        if found is None:
            raise ArtifactError(
                f"the model lacks a tensor: blk.{self.index}.{name}{suffix}",
                evidence=f"layers of {self.b.shape.architecture} have one; this has {len(self.shape.tensors)} others",
                hint="compare the file with its source (`./inv verify FILE.gguf`), or convert it again",
            )
        return found

    def width(self, name: str) -> int:
        return self.info(name).shape[0]


class CacheInputs:
    """Made for the first layer that reads them (build_attn_inp_kv and build_attn_inp_kv_iswa)."""

    def __init__(self, building: Building, windowed: bool) -> None:
        demand, job, shape = building.demand, building.job, building.shape
        self.cells = building.swa if windowed else building.base
        widest = max((layer.v_width for layer in shape.layers), default=0)
        self.k_rows = g.graph_input("I64", job.n_tokens)
        self.v_rows = g.graph_input("I64", job.n_tokens if demand.flash_attn else job.n_tokens * widest)
        per_stream = job.n_tokens // building.streams
        self.mask = g.graph_input("F16" if demand.flash_attn else "F32", self.cells, per_stream, 1, building.streams)
        own = [layer for layer in shape.layers if layer.owns_kv and (layer.window > 0) == windowed]
        self.k_rotation = _rotation(demand.type_k, {layer.head_k for layer in own}, grows=True)
        self.v_rotation = _rotation(demand.type_v, {layer.head_v for layer in own}, grows=False)


def _rotation(kind: str, heads: set[int], *, grows: bool) -> Tensor | None:
    """The Hadamard matrix that spreads a quantized cache's outliers (build_input_k_rot and _v_rot)."""
    if kind in ("f32", "f16", "bf16") or len(heads) != 1 or (head := min(heads)) % 64 or not head:
        return None
    size = 64
    while grows and head % (2 * size) == 0:
        size *= 2
    return g.graph_input("F32", size, size)
