"""What a layout takes of each device: the arithmetic of ``footprint``, what rides along, and what loads taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from runtime.memory.footprint import (
    CUDA,
    BufferBytes,
    Demand,
    LayerBytes,
    ModelBytes,
    Placement,
    Traits,
    footprint,
    layer_table,
)
from runtime.memory.layout import Layout
from runtime.memory.learned import Lessons
from toolchain.base.gguf import GgufHeader

Ask: TypeAlias = Callable[[Demand, Placement], tuple[BufferBytes, ...]]

PROJECTOR_WORK: Final = 0.5
"""Of a multimodal projector's weights, for its own compute buffer: allowed for, since it depends on the image."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes on one device; ``experts`` are part of ``weights``, ``output`` of ``compute``.

    ``results`` is the host's copy of the logits.
    """

    weights: int
    experts: int
    kv: int
    compute: int
    output: int
    results: int = 0
    mmproj: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.results + self.mmproj + self.adapters


@dataclass(kw_only=True)
class Sizes:
    """Of one model on ``n_gpus`` GPUs. ``ask``, once set, takes the library's word instead of the arithmetic."""

    headers: Sequence[GgufHeader]
    n_gpus: int
    mmproj_bytes: int = 0
    adapter_bytes: int = 0
    traits: Traits = CUDA
    lessons: Lessons = field(default_factory=Lessons)
    ask: Ask | None = None
    _known: dict[tuple[Demand, Placement], tuple[BufferBytes, ...]] = field(default_factory=dict)

    def table(self, demand: Demand) -> ModelBytes:
        """Bytes layer by layer, each layer with its share of the adapters."""
        table = layer_table(self.headers, demand)
        if not self.adapter_bytes:
            return table
        share = -(-self.adapter_bytes // len(table.layers))
        layers = tuple(LayerBytes(dense=row.dense + share, experts=row.experts, kv=row.kv) for row in table.layers)
        return replace(table, layers=layers)

    def buffers(self, demand: Demand, placement: Placement) -> tuple[BufferBytes, ...]:
        """The library's buffers, on the host and each GPU."""
        key = (demand, placement)
        if key not in self._known:
            if self.ask is not None:
                self._known[key] = self.ask(demand, placement)
            else:
                computed = footprint(self.headers, demand, placement, self.n_gpus, traits=self.traits)
                self._known[key] = self.lessons.corrected(demand, placement, computed)
        return self._known[key]

    @property
    def projector_bytes(self) -> int:
        """A multimodal projector with room for its work."""
        return int(self.mmproj_bytes * (1 + PROJECTOR_WORK))

    def needs(self, demand: Demand, layout: Layout) -> tuple[Need, ...]:
        """Everything, on the host and each GPU."""
        buffers = self.buffers(demand, layout.placement)
        projector = 1 if self.n_gpus else 0  # on the first GPU, as mtmd takes it
        n_layers = layout.n_all - 1
        share = -(-self.adapter_bytes // max(1, n_layers))
        riding = [0] * len(buffers)
        for layer in range(n_layers):
            riding[layout.device_of(layer)] += share
        return tuple(
            Need(
                weights=each.weights,
                experts=each.experts,
                kv=each.kv,
                compute=each.compute,
                output=each.output,
                results=each.results,
                mmproj=self.projector_bytes if number == projector else 0,
                adapters=riding[number],
            )
            for number, each in enumerate(buffers)
        )
