"""peft's LoRA layer on a packed weight: the pair's product is added into the base's, in place.

peft's own forward makes four matrices of the output's size of each layer, one of which is kept, and hands the input
over in float32, a copy where the training computes in bfloat16. Here there is one, and what is kept is the input as
it is and x A^T. On a CPU each fresh matrix also costs a page fault for every 4 KiB of it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable

from toolchain.lora.torch_engine.packed import PackedLinear, backward_product, forward_product


class AdaptedLinear(lora.Linear):  # type: ignore[misc]
    """As peft's; what is more than one plain pair (DoRA, an adapter that is switched off) peft computes itself."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or self.disable_adapters or self.merged or self.lora_variant or len(self.lora_A) != 1:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = self.lora_A
        base, dropout = self.base_layer, self.lora_dropout[name]
        rows = x.reshape(-1, base.in_features)
        dropped = dropout(rows) if isinstance(dropout, nn.Dropout) and dropout.training else None
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        product: torch.Tensor = _AdaptedProduct.apply(rows, dropped, a, b, self.scaling[name], base)
        if base.bias is not None:
            product += base.bias
        return product.view(*x.shape[:-1], base.out_features)


class _AdaptedProduct(torch.autograd.Function):  # type: ignore[misc]
    """x W^T + scale s A^T B^T for x (tokens, columns), A (rank, columns), B (rows, rank); s is x, or x after dropout.

    All in the dtype of x, the gradients of A and B in theirs. ``out=`` keeps autocast, which has nothing to cast
    here, from casting.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        base: PackedLinear,
    ) -> torch.Tensor:
        seen = x if dropped is None else dropped
        low = torch.mm(seen, a.to(x.dtype).t(), out=x.new_empty(len(x), len(a)))
        ctx.save_for_backward(seen, low, a, b, base.weight)
        ctx.scale, ctx.kind, ctx.unpacker = scale, base.kind, base.unpacker
        return forward_product(x, base.weight, base.kind, base.unpacker).addmm_(low, b.to(x.dtype).t(), alpha=scale)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, low, a, b, blocks = ctx.saved_tensors
        x_asked, dropped_asked, *_ = ctx.needs_input_grad
        dlow = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        da, db = (dlow.t() @ seen).to(a.dtype), (dy.t() @ low).mul_(ctx.scale).to(b.dtype)
        dx = backward_product(dy, blocks, ctx.kind, ctx.unpacker) if x_asked else None
        ddropped = None
        if dropped_asked:
            ddropped = dlow @ a.to(dy.dtype)
        elif dx is not None:
            dx.addmm_(dlow, a.to(dy.dtype))
        return dx, ddropped, da, db, None, None
