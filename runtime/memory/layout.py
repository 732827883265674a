"""Which layers lie on which device, as whole numbers of layers, and how a search packs them.

llama.cpp gives the GPUs consecutive layers, the first GPU the earliest, the output layer counting as the last one. With
the numbers of layers themselves as ``tensor_split`` its 32-bit shares come out as exactly these numbers (its own --fit
does so too, common/fit.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.memory.footprint import ModelBytes, Placement


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``counts``: layers on each GPU in order; what is left of ``n_all`` (the output layer among them), the first ones,
    is the host's. ``host_experts``: so many layers from the first keep their experts on the host."""

    n_all: int
    counts: tuple[int, ...]
    host_experts: int = 0

    @property
    def n_gpu_layers(self) -> int:
        return sum(self.counts)

    @property
    def is_whole(self) -> bool:
        """Whether everything but the input embedding is on GPUs."""
        return self.n_gpu_layers == self.n_all and not self.host_experts

    @property
    def placement(self) -> Placement:
        split = tuple(float(count) for count in self.counts) if len(self.counts) > 1 and any(self.counts) else ()
        return Placement(n_gpu_layers=self.n_gpu_layers, tensor_split=split, cpu_expert_layers=self.host_experts)

    def device_of(self, layer: int) -> int:
        """0 the host, 1 the first GPU; ``n_all - 1`` is the output layer."""
        place = layer - (self.n_all - self.n_gpu_layers)
        for device, count in enumerate(self.counts, 1):
            if 0 <= place < count:
                return device
            place -= max(0, count)
            if place < 0:
                break
        return 0


def layouts(
    table: ModelBytes, budgets: Sequence[int], *, n_gpu_layers: int | None, host_experts: int | None
) -> list[Layout]:
    """Ways to fill GPUs that have ``budgets`` bytes for layers; none when what is fixed does not fit.

    Fixed numbers are kept. Else all layers with as few experts on the host as possible, and where that cannot be, as
    many layers as possible, with all experts on the host and with none.
    """
    n_layers = len(table.layers)
    n_all = n_layers + 1
    has_experts = any(layer.experts for layer in table.layers)
    most_experts = n_layers if has_experts and host_experts is None else host_experts or 0
    least_experts = host_experts or 0

    def packed(layers: int, experts: int) -> tuple[tuple[int, ...], ...]:
        return _pack(_moved(table, experts)[n_all - layers :], budgets)

    if n_gpu_layers is not None:
        layers = n_all if n_gpu_layers < 0 else min(n_gpu_layers, n_all)
        fewest = _least(least_experts, most_experts, lambda experts: bool(packed(layers, experts)))
        return [] if fewest is None else _made(n_all, packed(layers, fewest), fewest)
    fewest = _least(least_experts, most_experts, lambda experts: bool(packed(n_all, experts)))
    if fewest is not None:
        return _made(n_all, packed(n_all, fewest), fewest)
    found = []
    for experts in {least_experts, most_experts}:
        left_out = _least(0, n_all, lambda out, e=experts: bool(packed(n_all - out, e)))  # type: ignore[misc]
        if left_out is not None:
            found += _made(n_all, packed(n_all - left_out, experts), experts)
    return found


def _made(n_all: int, ways: tuple[tuple[int, ...], ...], host_experts: int) -> list[Layout]:
    return [Layout(n_all=n_all, counts=counts, host_experts=host_experts) for counts in ways]


def _moved(table: ModelBytes, host_experts: int) -> list[int]:
    """Bytes of each layer, and last of the output layer, on a GPU."""
    sizes = [
        layer.dense + layer.kv + (layer.experts if index >= host_experts else 0)
        for index, layer in enumerate(table.layers)
    ]
    return [*sizes, table.output]


def _pack(sizes: Sequence[int], budgets: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Layers per GPU: first GPUs full, last GPUs full, all equally full; empty when they do not fit."""
    forward = _fill(sizes, budgets)
    if forward is None:
        return ()
    backward = _fill(sizes[::-1], budgets[::-1])
    low, high, even = 0.0, 1.0, forward
    for _ in range(8 if len(budgets) > 1 else 0):  # the smallest equal share of each budget that still holds all
        middle = (low + high) / 2
        shared = _fill(sizes, [int(budget * middle) for budget in budgets])
        if shared is None:
            low = middle
        else:
            high, even = middle, shared
    ways = [even, forward, *((backward[::-1],) if backward else ())]
    return tuple(dict.fromkeys(ways))


def _fill(sizes: Sequence[int], budgets: Sequence[int]) -> tuple[int, ...] | None:
    """Consecutive sizes into budgets in order, each as full as it gets; None when some are left over."""
    counts, at = [], 0
    for budget in budgets:
        taken, count = 0, 0
        while at < len(sizes) and taken + sizes[at] <= budget:
            taken, at, count = taken + sizes[at], at + 1, count + 1
        counts.append(count)
    return tuple(counts) if at == len(sizes) else None


def _least(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest number in [low, high] for which ``holds``, which stays true once it is; None when it never is."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
