"""Adapters of 2023, as finetune.cpp (``save_as_llama_lora``) and convert-lora-to-ggml.py wrote them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.build.ggla import MAGIC

Halves = tuple[NDArray[Any], NDArray[Any]]
"""A (inputs, rank) and B (outputs, rank), in float32 or float16."""


def write_ggla(path: Path, pairs: Mapping[str, Halves], *, rank: int = 4, alpha: int = 4, version: int = 1) -> Path:
    """``pairs`` by the weight's name, in their order."""
    data = struct.pack("<2I2i", MAGIC, version, rank, alpha)
    for name, (a, b) in pairs.items():
        for half, values in ((".loraA", a), (".loraB", b)):
            widths = values.shape[::-1] if values.shape[0] > 1 else values.shape[1:]  # ggml counts no trailing ones
            data += tensor_header(name + half, widths, kind=values.dtype == np.float16)
            data += bytes(-len(data) % 32) + values.tobytes()
    path.write_bytes(data)
    return path


def tensor_header(name: str, widths: Sequence[int], *, kind: int = 0) -> bytes:
    encoded = name.encode()
    return struct.pack(f"<3I{len(widths)}I", len(widths), len(encoded), kind, *widths) + encoded
