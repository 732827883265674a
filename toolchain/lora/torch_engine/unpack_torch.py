"""GGUF blocks to floats by torch operations, on any device.

transformers has them for most types (integrations/gguf/dequant.py); those that it lacks are here, after the C of
ggml/src/ggml-quants.c (dequantize_row_*), llama.cpp commit 0c1e570. All of them give the very bits that the built
library gives, which the tests hold for random blocks of each type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

import torch
from transformers.integrations.gguf import dequant

from toolchain.base.ggml_types import GGML_TYPES_BY_NAME

CHUNK_BYTES: Final = 64 * 2**20
"""Of float32 made at once: the operations between blocks and floats take several times as much."""


def unpack(blocks: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (rows, row_bytes) of the ggml type ``kind`` as ``dtype`` (rows, columns), computed in float32."""
    layout = GGML_TYPES_BY_NAME[kind]
    flat = blocks.reshape(-1, layout.block_bytes)
    floats = torch.empty(len(flat), layout.block_size, dtype=dtype, device=blocks.device)
    step = CHUNK_BYTES // (4 * layout.block_size)
    for first in range(0, len(flat), step):
        part = flat[first : first + step]
        own = _OWN.get(kind)
        values = own(part) if own else dequant.dequantize(part, layout.id, torch.float32)
        floats[first : first + step] = values.view(-1, layout.block_size)
    return floats.view(len(blocks), -1)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The 16-bit float at byte ``start`` of each block, as (blocks, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(packed: torch.Tensor, n_bits: int, width: int) -> torch.Tensor:
    """Fields of ``n_bits``, uint8 (blocks, values): of ``width`` bytes each one's lowest, then each one's next, ..."""
    shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    fields = packed.reshape(len(packed), -1, 1, width) >> shifts
    return (fields & (2**n_bits - 1)).view(len(packed), -1)


def _q1_0(blocks: torch.Tensor) -> torch.Tensor:
    scale = _half(blocks, 0)
    return torch.where(_fields(blocks[:, 2:], 1, 1) == 1, scale, -scale)


def _q2_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_fields(blocks[:, 2:], 2, 1).float() - 1) * _half(blocks, 0)


def _tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_fields(blocks[:, :64], 2, 32).float() - 1) * _half(blocks, 64)


def _q5(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Five-bit numbers: four bits of each in the nibbles after byte ``at + 4``, the fifth in 32 bits before."""
    return _fields(blocks[:, at + 4 :], 4, 16) | (_fields(blocks[:, at : at + 4], 1, 1) << 4)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_q5(blocks, 2).float() - 16) * _half(blocks, 0)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    return _q5(blocks, 4) * _half(blocks, 0) + _half(blocks, 2)


def _tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """Five ternary digits a byte, the byte being their fraction of 256; four in each of the last four bytes."""
    parts = []
    for start, end, width, digits in ((0, 32, 32, 5), (32, 48, 16, 5), (48, 52, 4, 4)):
        powers = torch.tensor([3**n for n in range(digits)], dtype=torch.uint8, device=blocks.device).view(-1, 1)
        shifted = blocks[:, start:end].reshape(len(blocks), 1, width) * powers  # modulo 256, as in C
        parts.append((shifted.to(torch.int16) * 3 >> 8).view(len(blocks), -1))
    return (torch.cat(parts, 1).float() - 1) * _half(blocks, 52)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    scale = _table(_E8M0_HALVES, blocks.device)[blocks[:, :1].int()]
    return _table(_FP4_DOUBLES, blocks.device)[_fields(blocks[:, 1:], 4, 16).int()] * scale


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    scale = _table(_UE4M3_HALVES, blocks.device)[blocks[:, :4].int()]
    values = _table(_FP4_DOUBLES, blocks.device)[_fields(blocks[:, 4:], 4, 8).int()]
    return values.view(-1, 4, 16) * scale[..., None]


def _ue4m3(byte: int) -> float:
    """An unsigned float of four bits of exponent and three of mantissa; 0x7F is no number, and zero here."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if byte == 0x7F:
        return 0.0
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


# Twice the values of FP4 (E2M1), which are whole numbers, and so half of the scales.
_FP4_DOUBLES: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
_E8M0_HALVES: Final = tuple(2.0 ** (byte - 128) for byte in range(256))
_UE4M3_HALVES: Final = tuple(_ue4m3(byte) / 2 for byte in range(256))


@cache
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


_OWN: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}

TYPES: Final = tuple(
    name for name, layout in GGML_TYPES_BY_NAME.items() if name in _OWN or layout.id in dequant.GGML_BLOCK
)
"""The block types that can be unpacked, by name."""
