"""CUDA libraries described in words: an ELF with a section table and fat binaries in it, and nothing that would run."""

from __future__ import annotations

import struct
from pathlib import Path

PTX, SASS, LTO = 1, 2, 8
A, F = 1 << 20, 1 << 21
ZSTD = 1 << 15
HOST = 0x11  # a 64-bit Linux host, as in every entry that nvcc writes

NAMES = ".shstrtab"
ELF_BYTES, SECTION_BYTES = 64, 64


def entry(
    kind: int, arch: int, flags: int = 0, *, payload: bytes = b"\x5a" * 24, header: int = 64, size: int | None = None
) -> bytes:
    """One entry; ``size`` is what it says of its payload where that is not the truth."""
    stated = len(payload) if size is None else size
    fields = struct.pack("<HHIQ", kind, 0x101, header, stated) + struct.pack("<12xI8xQ", arch, HOST | flags)
    return fields.ljust(max(header, 48), b"\0") + payload


def fatbin(*entries: bytes, magic: int = 0xBA55ED50, version: int = 1, size: int | None = None) -> bytes:
    """One fat binary; ``size`` is what it says of its entries where that is not the truth."""
    body = b"".join(entries)
    return struct.pack("<IHHQ", magic, version, 16, len(body) if size is None else size) + body


def elf(*sections: tuple[str, bytes], nobits: frozenset[str] = frozenset()) -> bytes:
    """A 64-bit little-endian ELF of these sections; of those in ``nobits`` only the header is there."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in [*dict(sections), NAMES])
    body = bytearray(ELF_BYTES)
    headers = [bytes(SECTION_BYTES)]
    for name, content in [*sections, (NAMES, names)]:
        at = names.index(b"\0" + name.encode() + b"\0") + 1
        type_ = 8 if name in nobits else 1
        headers.append(struct.pack("<IIQQQQIIQQ", at, type_, 0, 0, len(body), len(content), 0, 0, 8, 0))
        body += b"" if name in nobits else content + bytes(-len(content) % 8)
    count = len(headers)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    body[:ELF_BYTES] = identity + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, len(body), 0, ELF_BYTES, 0, 0, SECTION_BYTES, count, count - 1
    )
    return bytes(body) + b"".join(headers)


def library(folder: Path, *fatbins: bytes, section: str = ".nv_fatbin") -> Path:
    """A file with ``fatbins`` in one section, between two that are of no interest."""
    path = folder / "libdescribed.so"
    path.write_bytes(elf((".text", b"\xc3" * 13), (section, b"".join(fatbins)), (".data", b"\x01" * 7)))
    return path
