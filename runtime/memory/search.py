"""The settings of the best predicted speed that fit. Pure: sizes, devices and wishes in, a choice out.

In this order: the context that was asked for is kept; the default one is lowered by halves where nothing else fits. For
a context: layers and experts on the GPUs first, then other micro-batches and a q8_0 cache, where they let so much more
on the GPUs that a turn (speed.TURN) becomes faster by what each has to be worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from runtime.memory.devices import Device
from runtime.memory.footprint import Demand, Placement
from runtime.memory.kernels import Build, is_fast, runs_flash_attention
from runtime.memory.layout import Layout, layouts
from runtime.memory.placement import layer_devices
from runtime.memory.shape import ModelShape
from runtime.memory.sizes import Need, Sizes
from runtime.memory.speed import Speed, Work, predict
from runtime.settings import DEFAULT_N_CTX, OUTPUT_ROWS, parse_split, sequences_made

LEAST_N_CTX: Final = 512
"""The default context is lowered to no less."""

Q8_WORTH: Final = 1.10
"""A q8_0 cache costs a little quality: a turn has to become faster by as much."""

UBATCH_WORTH: Final = 1.05
"""Another micro-batch than llama.cpp's has to make a turn faster by as much."""

UBATCHES: Final = (1024, 2048, 256, 128)
_ROUNDS: Final = 6  # of packing layers and computing the buffers that come with the packing


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What the user, the recipe or the environment settled; None is for the search to choose.

    ``n_ctx`` is the context of all sequences together, or of each where they are ``separate``.
    """

    n_ctx: int | None = None
    n_gpu_layers: int | None = None
    n_cpu_moe: int | None = None
    tensor_split: tuple[float, ...] | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    type_k: str | None = None
    type_v: str | None = None
    n_seq_max: int = 1
    separate: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run the model, with its needs by device (host first). ``over`` bytes are missing; 0 when it fits."""

    demand: Demand
    layout: Layout
    needs: tuple[Need, ...]
    over: int
    speed: Speed

    @property
    def fits(self) -> bool:
        return self.over <= 0


@dataclass(frozen=True, kw_only=True)
class Search:
    """A model, the devices it may use and what is settled."""

    shape: ModelShape
    sizes: Sizes
    devices: tuple[Device, ...]
    build: Build
    work: Work
    fixed: Fixed

    @property
    def gpus(self) -> tuple[Device, ...]:
        return self.devices if self.devices[0].kind == "unified" else self.devices[1:]

    def best(self) -> Choice:
        """The best choice that fits, else the one that comes nearest at the context asked for."""
        nearest: Choice | None = None
        for n_ctx in self.contexts():
            choice = self.best_at(n_ctx)
            if choice.fits:
                return choice
            nearest = nearest or choice
        assert nearest is not None
        return nearest

    def contexts(self) -> Iterator[int]:
        """The one that is settled, or the default and its halves."""
        if self.fixed.n_ctx is not None:
            yield self.fixed.n_ctx
            return
        n_ctx = default_context(self.shape)
        while True:
            yield n_ctx
            n_ctx //= 2
            if n_ctx < LEAST_N_CTX:
                return

    def best_at(self, n_ctx: int) -> Choice:
        """The best choice for this context."""
        demand = self.demand(n_ctx)
        base = self.settle(demand)
        if base.fits and (not self.gpus or base.layout.is_whole):
            return base
        for other, worth in self.micro_batches(base):
            base = self.better(base, other, worth)
        if self.fixed.type_k is None and self.fixed.type_v is None and self.gpus and self.is_fast("q8_0", "q8_0"):
            small = replace(base.demand, type_k="q8_0", type_v="q8_0", flash_attn=True)
            base = self.better(base, small, Q8_WORTH)
        return base

    def better(self, base: Choice, demand: Demand, worth: float) -> Choice:
        """The best choice for ``demand`` where it is faster than ``base`` by the factor ``worth``, or alone fits."""
        sketch = self.sketch(demand, base.layout)
        if sketch is None or (base.fits and sketch.speed.turn_s * worth > base.speed.turn_s):
            return base
        found = self.settle(demand)
        if not found.fits or not self.may_run(found):
            return base
        return found if not base.fits or found.speed.turn_s * worth < base.speed.turn_s else base

    def demand(self, n_ctx: int) -> Demand:
        """With llama.cpp's defaults for what is not settled."""
        fixed, types = self.fixed, (self.fixed.type_k or "f16", self.fixed.type_v or "f16")
        n_batch = fixed.n_batch or max(2048, fixed.n_ubatch or 0)
        backends = {device.backend for device in self.gpus or self.devices}
        return Demand(
            n_ctx=n_ctx * (fixed.n_seq_max if fixed.separate else 1),
            n_batch=n_batch,
            n_ubatch=fixed.n_ubatch or min(512, n_batch),
            type_k=types[0],
            type_v=types[1],
            n_seq_max=fixed.n_seq_max,
            n_outputs_max=max(OUTPUT_ROWS, fixed.n_seq_max),
            kv_unified=fixed.n_seq_max > 1 and not fixed.separate,
            flash_attn=all(runs_flash_attention(backend, self.shape) for backend in backends),
        )

    def micro_batches(self, base: Choice) -> Iterator[tuple[Demand, float]]:
        """Other micro-batches that can make a difference, with the factor that each has to be worth.

        A smaller one has to free a layer's bytes; a larger one helps where weights are copied from the host.
        """
        demand = base.demand
        layers = [row.dense + row.kv for row in self.sizes.table(demand).layers]
        freed = sum(need.compute for need in base.needs) * 3 // 4
        for n_ubatch in UBATCHES:
            if self.fixed.n_ubatch is not None or n_ubatch > min(demand.n_batch, demand.n_ctx):
                continue
            if n_ubatch > demand.n_ubatch and self.gpus and base.fits:
                yield replace(demand, n_ubatch=n_ubatch), UBATCH_WORTH
            if n_ubatch < demand.n_ubatch and (not base.fits or freed >= min(layers)):
                yield replace(demand, n_ubatch=n_ubatch), UBATCH_WORTH

    def is_fast(self, type_k: str, type_v: str) -> bool:
        return all(is_fast(device.backend, self.build, self.shape, type_k, type_v) for device in self.gpus)

    def may_run(self, choice: Choice) -> bool:
        """Whether a cache type that the search chose has a fast kernel wherever a layer's cache lies."""
        chosen = self.fixed.type_k is None and choice.demand.type_k not in ("f16", "f32")
        return not chosen or choice.layout.n_gpu_layers >= choice.layout.n_all - 1

    def sketch(self, demand: Demand, like: Layout) -> Choice | None:
        """The speed of a choice whose compute buffers are those of ``like``: for a first comparison."""
        if not self.gpus:
            return self.choice(demand, like, needs=())
        compute = [each.compute for each in self.sizes.buffers(demand, like.placement)[1:]]
        packed = self.pack(demand, compute)
        return self.choice(demand, packed[0], needs=()) if packed else None

    def settle(self, demand: Demand) -> Choice:
        """Pack layers, compute the buffers that come with the packing, and pack again until both agree."""
        n_all, gpus = self.shape.n_layer_all + 1, len(self.gpus)
        if not gpus:
            return self.choice(demand, Layout(n_all=n_all, counts=()))
        if self.fixed.tensor_split is not None:
            return self.choice(demand, self.as_split(self.fixed.tensor_split))
        compute = [each.compute for each in self.sizes.buffers(demand, self.spread().placement)[1:]]
        best: Choice | None = None
        for _ in range(_ROUNDS):
            packed = self.pack(demand, compute)
            if not packed:
                break
            found = self.choice(demand, packed[0])
            if best is None or (found.fits, found.speed.generation_tps) > (best.fits, best.speed.generation_tps):
                best = found
            actual = [need.compute for need in found.needs[1:]]
            if found.fits and actual == compute:
                break
            lacking = self.missing(found.needs)[1:]
            if not found.fits and not any(lacking):
                break  # the GPUs are as full as can be, and the host is too small
            # What still does not fit on a GPU is padding, which a table of layers cannot see.
            compute = [max(0, size) + lack for size, lack in zip(actual, lacking, strict=True)]
        return best or self.choice(demand, self.as_asked())

    def pack(self, demand: Demand, compute: Sequence[int]) -> list[Layout]:
        """Layouts that leave room for ``compute``, the fastest first."""
        table = self.sizes.table(demand)
        room = [self.room(number) - size for number, size in enumerate(compute)]
        room[0] -= self.sizes.projector_bytes
        found = layouts(table, room, n_gpu_layers=self.fixed.n_gpu_layers, host_experts=self.fixed.n_cpu_moe)
        rates = {way: predict(table, self.work, demand, way, self.devices).generation_tps for way in found}
        return sorted(found, key=lambda way: -round(rates[way], 3))

    def choice(self, demand: Demand, layout: Layout, *, needs: tuple[Need, ...] | None = None) -> Choice:
        found = self.sizes.needs(demand, layout) if needs is None else needs
        speed = predict(self.sizes.table(demand), self.work, demand, layout, self.devices)
        over = sum(self.missing(found)) if found else 0
        return Choice(demand=demand, layout=layout, needs=found, over=over, speed=speed)

    def missing(self, needs: Sequence[Need]) -> list[int]:
        """Bytes that are missing on the host and on each GPU."""
        lacks = [max(0, need.total - self.room(number)) for number, need in enumerate(needs[1:])]
        first = self.devices[0]
        together = needs if first.kind == "unified" else needs[:1]
        return [max(0, pooled(together, first, self.sizes) - first.usable_bytes), *lacks]

    def room(self, gpu: int) -> int:
        device = self.gpus[gpu]
        limit = device.gpu_limit_bytes
        return device.usable_bytes if limit is None else min(device.usable_bytes, limit)

    def spread(self) -> Layout:
        """All layers over all GPUs: where a search begins."""
        n_all, gpus = self.shape.n_layer_all + 1, len(self.gpus)
        counts = tuple(n_all * (number + 1) // gpus - n_all * number // gpus for number in range(gpus))
        return Layout(n_all=n_all, counts=counts, host_experts=self.fixed.n_cpu_moe or 0)

    def as_asked(self) -> Layout:
        """What is settled, whether it fits or not, and nothing on GPUs where all is open."""
        n_all, gpus = self.shape.n_layer_all + 1, len(self.gpus)
        asked = self.fixed.n_gpu_layers or 0
        layers = n_all if asked < 0 else min(asked, n_all)
        counts = tuple(layers * (number + 1) // gpus - layers * number // gpus for number in range(gpus))
        return Layout(n_all=n_all, counts=counts, host_experts=self.fixed.n_cpu_moe or 0)

    def as_split(self, split: tuple[float, ...]) -> Layout:
        """The layers that llama.cpp would give each GPU for this ``tensor_split``."""
        layers = -1 if self.fixed.n_gpu_layers is None else self.fixed.n_gpu_layers
        asked = Placement(n_gpu_layers=layers, tensor_split=split)
        on = layer_devices(self.shape, asked, len(self.gpus))
        counts = tuple(on.count(number) for number in range(1, len(self.gpus) + 1))
        return Layout(n_all=len(on), counts=counts, host_experts=self.fixed.n_cpu_moe or 0)


def default_context(shape: ModelShape) -> int:
    """Tokens of context unless asked otherwise."""
    return min(shape.n_ctx_train or DEFAULT_N_CTX, DEFAULT_N_CTX)


def pooled(needs: Sequence[Need], device: Device, sizes: Sizes) -> int:
    """Bytes that ``needs`` take of one memory. Metal reads the file's own pages, each once, whatever is there twice."""
    total = sum(need.total for need in needs)
    if device.backend == "Metal":
        weights = sum(need.weights for need in needs)
        total -= max(0, weights - sum(header.tensor_bytes for header in sizes.headers))
    return total


def as_fixed(values: Mapping[str, int | str], sequences: int = 1, *, separate: bool = False) -> Fixed:
    """From settled settings by name and the replies decoded together; a ``tensor_split`` of no numbers is none."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int)}
    split = parse_split(str(values.get("tensor_split", "")))
    return Fixed(
        n_ctx=numbers.get("n_ctx"),
        n_gpu_layers=numbers.get("n_gpu_layers"),
        n_cpu_moe=numbers.get("n_cpu_moe"),
        tensor_split=split or None,
        n_batch=numbers.get("n_batch"),
        n_ubatch=numbers.get("n_ubatch"),
        type_k=str(values["type_k"]) if "type_k" in values else None,
        type_v=str(values["type_v"]) if "type_v" in values else None,
        n_seq_max=sequences if separate else sequences_made(sequences),
        separate=separate,
    )
