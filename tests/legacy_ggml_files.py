"""Writes small GGML ``.bin`` files of 2023 as the llama.cpp of that summer did: LLaMA with a byte vocabulary."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

MAGICS: Final = {"GGML": b"lmgg", "GGMF": b"fmgg", "GGJT": b"tjgg"}
FTYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q6_K": 18}


def write_legacy(
    path: Path,
    *,
    container: str = "GGJT",
    version: int = 3,
    type: str = "Q4_0",
    n_vocab: int = 512,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 4,
    n_layer: int = 2,
    n_ff: int = 96,
    seed: int = 0,
) -> Path:
    """A LLaMA of random weights at ``path``; matrices in ``type``, norms in f32."""
    numbers = np.random.default_rng(seed)
    with path.open("wb") as out:
        out.write(MAGICS[container])
        if container != "GGML":
            out.write(struct.pack("<I", version))
        n_mult = 32
        out.write(struct.pack("<7I", n_vocab, n_embd, n_mult, n_head, n_layer, n_embd // n_head, FTYPES[type]))
        for number, piece in enumerate(_pieces(n_vocab)):
            out.write(struct.pack("<I", len(piece)) + piece)
            if container != "GGML":
                out.write(struct.pack("<f", -float(number)))
        for name, shape in _tensors(n_vocab, n_embd, n_embd // n_head * n_head_kv, n_layer, n_ff):
            kind = "F32" if len(shape) == 1 else type
            # Rows that must differ from their neighbours: norms are ones, matrices random.
            values = np.ones(shape, np.float32) if len(shape) == 1 else numbers.standard_normal(shape, np.float32) * 0.1
            _write_tensor(out, name, values, kind, padded=container == "GGJT")
    return path


def _write_tensor(out: Any, name: str, values: np.ndarray[Any, Any], kind: str, *, padded: bool) -> None:
    code = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(values, code)
    raw = name.encode()
    extents = values.shape[::-1]  # ggml names the fastest first
    out.write(struct.pack("<3I", len(extents), len(raw), code) + struct.pack(f"<{len(extents)}I", *extents) + raw)
    if padded:
        out.write(b"\0" * (-out.tell() % 32))
    out.write(data.tobytes())


def _pieces(n_vocab: int) -> Iterator[bytes]:
    """As a SentencePiece model was written then: control pieces as marks, bytes raw, words with a plain space."""
    yield from (b" \xe2\x81\x87 ", b"", b"")
    yield from (bytes([byte]) for byte in range(256))
    yield from (f" w{number}".encode() for number in range(n_vocab - 259))


def _tensors(
    n_vocab: int, n_embd: int, kv_width: int, n_layer: int, n_ff: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and extents in numpy's order."""
    yield "tok_embeddings.weight", (n_vocab, n_embd)
    yield "norm.weight", (n_embd,)
    yield "output.weight", (n_vocab, n_embd)
    for layer in range(n_layer):
        at = f"layers.{layer}."
        for name, rows in (("q", n_embd), ("k", kv_width), ("v", kv_width), ("o", n_embd)):
            yield f"{at}attention.w{name}.weight", (rows, n_embd)
        yield f"{at}attention_norm.weight", (n_embd,)
        for name, shape in (("1", (n_ff, n_embd)), ("2", (n_embd, n_ff)), ("3", (n_ff, n_embd))):
            yield f"{at}feed_forward.w{name}.weight", shape
        yield f"{at}ffn_norm.weight", (n_embd,)
