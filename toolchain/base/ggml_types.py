"""The tensor types and file types a GGUF may name, and the starts of files that are no GGUF, as tables.

Numbers, block sizes and byte sizes are those of llama.cpp commit 0c1e570: ``enum ggml_type`` in
ggml/include/ggml.h, ``type_traits`` in ggml/src/ggml.c with the block structs of ggml/src/ggml-common.h
(the same figures as ``GGML_QUANT_SIZES`` in gguf-py/gguf/constants.py), and ``enum llama_ftype`` in
include/llama.h. Names are in the upper-case spelling of gguf-py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, kw_only=True)
class GgmlType:
    """One storage type: rows are cut into blocks of ``block_size`` elements, ``block_bytes`` each."""

    id: int
    name: str
    block_size: int
    block_bytes: int

    def nbytes(self, elements: int) -> int:
        """Bytes of that many elements, which the caller knows to be whole blocks."""
        return elements // self.block_size * self.block_bytes


_TYPES = (
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)

GGML_TYPES: Final[Mapping[int, GgmlType]] = MappingProxyType(
    {row[0]: GgmlType(id=row[0], name=row[1], block_size=row[2], block_bytes=row[3]) for row in _TYPES}
)
GGML_TYPES_BY_NAME: Final[Mapping[str, GgmlType]] = MappingProxyType({t.name: t for t in GGML_TYPES.values()})

REMOVED_GGML_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)

FILE_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        7: "Q8_0",
        8: "Q5_0",
        9: "Q5_1",
        10: "Q2_K",
        11: "Q3_K_S",
        12: "Q3_K_M",
        13: "Q3_K_L",
        14: "Q4_K_S",
        15: "Q4_K_M",
        16: "Q5_K_S",
        17: "Q5_K_M",
        18: "Q6_K",
        19: "IQ2_XXS",
        20: "IQ2_XS",
        21: "Q2_K_S",
        22: "IQ3_XS",
        23: "IQ3_XXS",
        24: "IQ1_S",
        25: "IQ4_NL",
        26: "IQ3_S",
        27: "IQ3_M",
        28: "IQ2_S",
        29: "IQ2_M",
        30: "IQ4_XS",
        31: "IQ1_M",
        32: "BF16",
        36: "TQ1_0",
        37: "TQ2_0",
        38: "MXFP4_MOE",
        39: "NVFP4",
        40: "Q1_0",
        41: "Q2_0",
    }
)
FILE_TYPE_GUESSED_BIT: Final = 1024

# The magics of 2023 are u32 constants (LLAMA_FILE_MAGIC_* in llama.h), so their letters lie backwards.
_CONVERT_ORIGINAL = "of 2023; convert the original model instead"
FOREIGN_STARTS: Final[Mapping[bytes, str]] = MappingProxyType(
    {
        b"lmgg": f"a GGML .bin {_CONVERT_ORIGINAL}",
        b"fmgg": f"a GGMF .bin {_CONVERT_ORIGINAL}",
        b"tjgg": f"a GGJT .bin {_CONVERT_ORIGINAL}",
        b"algg": "a ggla adapter of the 2023 finetune program",
        b"nsgg": "a llama.cpp session file",
        b"qsgg": "a llama.cpp sequence state file",
        b"PK\x03\x04": "a zip archive (PyTorch checkpoints are zips); it has to be converted",
        b"\x80\x02": "a Python pickle (an old PyTorch checkpoint); it has to be converted",
        b"\x1f\x8b": "gzip data; unpack it first",
        b"version https://git-lfs.": "a git-lfs pointer and not the file it stands for; run git lfs pull",
    }
)


def name_format(head: bytes) -> str:
    """What a file that should have been a GGUF seems to be."""
    for start, name in FOREIGN_STARTS.items():
        if head.startswith(start):
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (an error or login page saved in its place)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file; it has to be converted"
    if not head.strip(b"\0"):
        return "zero bytes (a download that never arrived)" if head else "an empty file"
    return "JSON text" if text.startswith(b"{") else "a file of unknown format"
