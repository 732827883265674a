"""Layers whose weight stays in its GGUF blocks and is unpacked, a tile at a time, for the moment of each product.

A frozen weight takes part in two products: y = x W^T going forward and dx = dy W going back. Neither needs more of
the weight than some of its rows at a time, and going back needs nothing of the forward pass: no activation is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from toolchain.lora.torch_engine.unpack import Unpacker, columns


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """A frozen ``nn.Linear``: ``weight`` is uint8 (out_features, row_bytes), the blocks as they lie in the GGUF.

    peft takes it for the Linear that it is. Blocks are integers to torch, so nothing that casts a model's floats
    (``model.to(dtype)``, peft, accelerate) touches them, and peft does not give the adapter their dtype. The product
    is computed in the dtype of its input. ``gguf_name`` and ``row_order``: see ``load_base``.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        kind: str,
        *,
        unpacker: Unpacker,
        gguf_name: str,
        bias: nn.Parameter | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the float matrix
        self.in_features, self.out_features = columns(weight, kind), len(weight)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.kind, self.unpacker, self.gguf_name = kind, unpacker, gguf_name
        self.row_order: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = packed_product(input.reshape(-1, self.in_features), self.weight, self.kind, self.unpacker)
        if self.bias is not None:
            product += self.bias
        return product.view(*input.shape[:-1], self.out_features)

    @property
    def W_q(self) -> torch.Tensor:
        """By this name peft (utils/integrations.py, dequantize_module_weight) sees that DoRA must unpack a weight."""
        return self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole weight as floats (out_features, in_features)."""
        return self.unpacker.unpack(self.weight, self.kind, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class PackedEmbedding(nn.Embedding):  # type: ignore[misc]
    """A frozen ``nn.Embedding`` of GGUF blocks: only the rows that are asked for are unpacked, each once.

    An output layer tied to it is a PackedLinear with the same Parameter. ``scale`` is what Gemma's models multiply
    their embeddings with.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        kind: str,
        *,
        unpacker: Unpacker,
        gguf_name: str,
        dtype: torch.dtype,
        scale: torch.Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = len(weight), columns(weight, kind)
        self.padding_idx = self.max_norm = None  # nn.Embedding's own, for which a frozen table has no use
        self.weight = weight
        self.kind, self.unpacker, self.gguf_name, self.dtype = kind, unpacker, gguf_name, dtype
        self.row_order: torch.Tensor | None = None
        self.register_buffer("scale", None if scale is None else scale.to(dtype), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows, place = torch.unique(input, return_inverse=True)
        values = self.unpacker.unpack(self.weight[rows], self.kind, self.dtype)
        return (values if self.scale is None else values * self.scale)[place]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


def packed_product(x: torch.Tensor, blocks: torch.Tensor, kind: str, unpacker: Unpacker) -> torch.Tensor:
    """x W^T (tokens, rows) for ``x`` (tokens, columns) and W of blocks (rows, row_bytes), in the dtype of ``x``."""
    product: torch.Tensor = _Product.apply(x, blocks, kind, unpacker)
    return product


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """x W^T over tiles of W's rows; the gradient of x is dy W over the same tiles, the weight has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, blocks: torch.Tensor, kind: str, unpacker: Unpacker) -> torch.Tensor:
        ctx.save_for_backward(blocks)
        ctx.kind, ctx.unpacker = kind, unpacker
        return forward_product(x, blocks, kind, unpacker)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (blocks,) = ctx.saved_tensors
        return backward_product(dy, blocks, ctx.kind, ctx.unpacker), None, None, None


def forward_product(x: torch.Tensor, blocks: torch.Tensor, kind: str, unpacker: Unpacker) -> torch.Tensor:
    """x W^T, unknown to autograd."""
    product = x.new_empty(len(x), len(blocks))
    for rows, weight in unpacker.tiles(blocks, kind, x.dtype):
        torch.mm(x, weight.t(), out=product[:, rows])
    return product


def backward_product(dy: torch.Tensor, blocks: torch.Tensor, kind: str, unpacker: Unpacker) -> torch.Tensor:
    """dy W, unknown to autograd."""
    dx = dy.new_zeros(len(dy), columns(blocks, kind))
    for rows, weight in unpacker.tiles(blocks, kind, dy.dtype):
        dx.addmm_(dy[:, rows], weight)
    return dx
