"""GGUF blocks to floats: on a CPU by the built library itself, on other devices by torch operations.

On a CPU the numbers are those that llama.cpp computes with, because its own code makes them, on all cores. F32, F16
and BF16 are types of torch too and need no library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from toolchain.base.errors import UsageError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.lora.forms.ggml_values import open_values
from toolchain.lora.torch_engine import unpack_torch

PLAIN_TYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose blocks are single numbers that torch knows."""

TILE_BYTES: Final = 8 * 2**20
"""Of float32 unpacked at once on a CPU. On a base of 100M parameters, Q4_K_M, a step of 1,024 tokens takes 2 % more
processor time than on unpacked matrices with tiles of 8 MiB or more, 8 % more with tiles of 1 MiB."""


class Unpacker:
    """Unpacks rows of blocks. One serves all layers of a process: they share its scratch."""

    def __init__(self, lib_dir: Path, n_threads: int) -> None:
        self._values = open_values(lib_dir, n_threads)
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def unpack(self, blocks: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """``blocks``, uint8 (rows, row_bytes) of the ggml type ``kind``, as ``dtype`` (rows, columns)."""
        if kind in PLAIN_TYPES:
            return blocks.view(PLAIN_TYPES[kind]).to(dtype)
        if blocks.device.type != "cpu":
            return unpack_torch.unpack(blocks, kind, dtype)
        floats = torch.empty(len(blocks), columns(blocks, kind))
        self._values.unpack(blocks.numpy(), kind, floats.numpy())
        return floats.to(dtype)

    def tiles(self, blocks: torch.Tensor, kind: str, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """All of ``unpack``, as (which rows, their floats) one after the other: a tile is good until the next one.

        On a CPU the tiles are one piece of memory that stays the process's own: fresh memory for each would cost a
        page fault for every 4 KiB of it. Numbers that are of ``dtype`` already are one tile, as they lie in the file.
        """
        if PLAIN_TYPES.get(kind) == dtype:
            yield slice(0, len(blocks)), blocks.view(dtype)
            return
        on_cpu = blocks.device.type == "cpu"
        step = max(1, (TILE_BYTES if on_cpu else unpack_torch.CHUNK_BYTES) // (4 * columns(blocks, kind)))
        for first in range(0, len(blocks), step):
            rows = slice(first, min(first + step, len(blocks)))
            yield rows, (self._reused if on_cpu else self.unpack)(blocks[rows], kind, dtype)

    def _reused(self, blocks: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """As ``unpack``, into the scratch."""
        shape = len(blocks), columns(blocks, kind)
        if kind in PLAIN_TYPES:
            return self._room(dtype, shape).copy_(blocks.view(PLAIN_TYPES[kind]))
        floats = self._room(torch.float32, shape)
        self._values.unpack(blocks.numpy(), kind, floats.numpy())
        return floats if dtype == torch.float32 else self._room(dtype, shape).copy_(floats)

    def _room(self, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
        size = shape[0] * shape[1]
        if dtype not in self._scratch or self._scratch[dtype].numel() < size:
            self._scratch[dtype] = torch.empty(size, dtype=dtype)
        return self._scratch[dtype][:size].view(shape)


def columns(blocks: torch.Tensor, kind: str) -> int:
    """How many weights each row of these blocks holds."""
    layout = GGML_TYPES_BY_NAME[kind]
    return int(blocks.shape[-1]) // layout.block_bytes * layout.block_size


def require_known(kind: str) -> None:
    """UsageError when weights of the ggml type ``kind`` cannot be unpacked."""
    if kind not in PLAIN_TYPES and kind not in unpack_torch.TYPES:
        able = ", ".join([*PLAIN_TYPES, *unpack_torch.TYPES])
        raise UsageError(
            f"weights of the type {kind} cannot be trained on",
            evidence=f"those that can: {able}",
            hint="choose another file of the model",
        )
