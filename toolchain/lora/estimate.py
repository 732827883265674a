"""How much memory a training takes, by arithmetic on the base's header; and the micro-batch that fits in what is free.

Counted is one process: its imports, the base in its blocks, the adapter with gradient and AdamW's two moments, what
the backward pass needs of the forward pass, the loss, and the scratch of unpacking. The short probe measures the same
before anything is trained; these figures are for refusing early and for choosing what the probe tries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from toolchain.base.console import format_bytes
from toolchain.base.errors import MemoryFitError
from toolchain.base.gguf import GgufHeader
from toolchain.lora.targets import adaptable

IMPORTS_BYTES: Final = 400 << 20
"""torch, transformers and peft on a CPU, imported and idle."""
ADAPTER_BYTES: Final = 16
"""A trained parameter: weight, gradient and AdamW's two moments (arXiv 1412.6980), float32 each."""
LOSS_LOGITS: Final[Mapping[str, int]] = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that are there at once (CHUNK_LOGITS in torch_engine/loss.py)."""
LOGIT_BYTES: Final = 12
"""A logit in float32, which its gradient replaces, and what a model that caps its logits keeps to go back."""
SCRATCH_BYTES: Final = 64 << 20
"""Tiles of unpacked weight, and what the allocators round up."""
MARGIN: Final = 0.9
"""The share of free memory that an estimate may take."""

FORWARD, BACKWARD, UNPACK = 2, 2, 200
"""Costs of a weight in a block: one token's product forward, and backward to the input; and unpacking it once, which
all tokens that are computed at once share."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a base the arithmetic needs; widths are elements. ``pairs`` are (inputs, outputs) of the trained ones."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    q_width: int
    kv_width: int
    n_vocab: int
    weight_bytes: int
    pairs: tuple[tuple[int, int], ...]

    def trained_parameters(self, form: Form) -> int:
        """Of the pairs, and of one magnitude an output with DoRA."""
        return sum(form.rank * (inputs + outputs) + (outputs if form.dora else 0) for inputs, outputs in self.pairs)


@dataclass(frozen=True, kw_only=True)
class Form:
    """The adapter's form, the bytes of a number in the products, and where these are computed."""

    rank: int
    dora: bool
    dtype_bytes: int
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed at once in one process: ``micro_rows`` rows of ``n_ctx`` tokens."""

    n_ctx: int
    micro_rows: int
    checkpointing: bool

    @property
    def tokens(self) -> int:
        return self.n_ctx * self.micro_rows

    @property
    def cost(self) -> float:
        """Relative time of a token: the products, once more forward with checkpointing, and the unpacking for each."""
        passes = 3 if self.checkpointing else 2
        return FORWARD * (passes - 1) + BACKWARD + passes * UNPACK / self.tokens


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one process, by what takes them."""

    imports: int
    weights: int
    adapter: int
    activations: int
    loss: int
    scratch: int

    @property
    def total(self) -> int:
        return self.imports + self.weights + self.adapter + self.activations + self.loss + self.scratch

    def lines(self) -> list[str]:
        return [f"{name:<12} {format_bytes(count)}" for name, count in (*vars(self).items(), ("total", self.total))]


def shape_of(headers: Sequence[GgufHeader], targets: Sequence[str]) -> Shape:
    """The shape of a base whose ``targets`` are trained; keys that are missing count as in llama.cpp's loader."""
    first = headers[0]
    n_embd, n_head = first.arch_int("embedding_length") or 0, max(first.arch_ints("attention.head_count") or (1,))
    n_head_kv = max(first.arch_ints("attention.head_count_kv") or (n_head,))
    head = first.arch_int("attention.key_length") or n_embd // max(1, n_head)
    used = first.arch_int("expert_used_count") or 1
    n_ff = used * (first.arch_int("expert_feed_forward_length") or max(first.arch_ints("feed_forward_length") or (0,)))
    return Shape(
        n_layer=first.n_layer or 1,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        q_width=n_head * head,
        kv_width=n_head_kv * head,
        n_vocab=first.n_vocab or 0,
        weight_bytes=sum(header.tensor_bytes for header in headers),
        pairs=tuple((inputs, outputs) for suffix, inputs, outputs in adaptable(headers) if suffix in targets),
    )


def needed(shape: Shape, form: Form, work: Work) -> Need:
    """What one process takes at its peak."""
    kept = 1 + (1 if work.checkpointing else shape.n_layer)  # one more for the gradients of the block at hand
    row_bytes = shape.n_embd * work.tokens * form.dtype_bytes
    borders = shape.n_layer * row_bytes if work.checkpointing else 0
    mask = work.micro_rows * work.n_ctx**2 * (1 + form.dtype_bytes)
    return Need(
        imports=IMPORTS_BYTES,
        weights=shape.weight_bytes,
        adapter=ADAPTER_BYTES * shape.trained_parameters(form),
        activations=kept * _layer_bytes(shape, form, work) + borders + mask,
        loss=LOGIT_BYTES * min(LOSS_LOGITS[form.device], work.tokens * shape.n_vocab) + 3 * row_bytes,
        scratch=SCRATCH_BYTES,
    )


def choose_work(
    shape: Shape,
    form: Form,
    *,
    n_ctx: int,
    rows: int,
    free_bytes: int,
    micro_rows: int | None = None,
    checkpointing: bool | None = None,
) -> Work:
    """The cheapest work that fits into ``free_bytes``; what the recipe fixes (not None) stays.

    ``rows`` are one process's of a step; micro-batches divide them. Raises MemoryFitError when nothing fits.
    """
    sizes = [micro_rows] if micro_rows else [size for size in range(rows, 0, -1) if rows % size == 0]
    ways = [checkpointing] if checkpointing is not None else [False, True]
    every = [Work(n_ctx=n_ctx, micro_rows=size, checkpointing=way) for size in sizes for way in ways]
    fitting = [work for work in every if needed(shape, form, work).total <= MARGIN * free_bytes]
    if fitting:
        return min(fitting, key=lambda work: work.cost)
    work = min(every, key=lambda work: needed(shape, form, work).total)
    least = needed(shape, form, work)
    how = f"with micro_batch {work.micro_rows}, gradient_checkpointing {'true' if work.checkpointing else 'false'}"
    raise MemoryFitError(
        f"this training needs {format_bytes(least.total)} at least, and {format_bytes(free_bytes)} may be used",
        evidence="\n".join([*least.lines(), how, f"an estimate may take {MARGIN:.0%} of that"]),
        hint=_what_to_lower(work, least),
    )


def _layer_bytes(shape: Shape, form: Form, work: Work) -> int:
    """What the backward pass of one block needs of its forward pass.

    Of transformers' Llama, by what autograd saves: each norm its input in float32, twice, and its result, which is
    the input of the pairs' A; rotated q, k, v, k and v repeated for the heads, the attention's result and its copy in
    rows; of the feed-forward part gate, its activation, up and their product; of each pair the A's result. Attention
    scores are not kept by the kernels of scaled_dot_product_attention.
    """
    norms = 2 * shape.n_embd * (8 + form.dtype_bytes)
    attention = 6 * shape.q_width + 2 * shape.kv_width
    pairs = form.rank * max(1, len(shape.pairs) // shape.n_layer)
    return work.tokens * (norms + (attention + 4 * shape.n_ff + pairs) * form.dtype_bytes)


def _what_to_lower(work: Work, least: Need) -> str:
    if least.weights + least.imports > least.total / 2:
        return "take a smaller base or quantization, or raise budget.memory_gib if it is set"
    lower = ["train.n_ctx", "adapter.rank"]
    if work.micro_rows > 1:
        lower.insert(0, "train.micro_batch")
    if not work.checkpointing:
        lower.insert(0, "train.gradient_checkpointing (set it to true)")
    return f"lower {', '.join(lower)}, or raise budget.memory_gib if it is set"
