"""The routed experts of a mixture, left in their GGUF blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import nn

from toolchain.lora.torch_engine.packed import packed_product
from toolchain.lora.torch_engine.unpack import Unpacker

PARTS: Final = ("gate", "up", "down")


class PackedExperts(nn.Module):  # type: ignore[misc]
    """In place of transformers' fused experts: of each expert that a token is routed to, tiles are unpacked.

    ``gate``, ``up`` and ``down`` are uint8 (experts, rows, row_bytes) of the ggml types ``kinds``. They are no
    Linear modules, and peft gives them no adapter: a pair for each expert would be most of the adapter.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        kinds: Mapping[str, str],
        *,
        unpacker: Unpacker,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        for part in PARTS:
            self.register_parameter(part, weights[part])
        self.kinds, self.unpacker, self.act_fn = kinds, unpacker, act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden_states`` (tokens, width), the others (tokens, experts of each): the weighted sum over experts."""
        total = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == expert)
            seen = hidden_states[token]
            inner = self.act_fn(self._product("gate", expert, seen)) * self._product("up", expert, seen)
            out = self._product("down", expert, inner) * top_k_weights[token, slot, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total

    def _product(self, part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        return packed_product(x, getattr(self, part)[expert], self.kinds[part], self.unpacker)
