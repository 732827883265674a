"""Which GPU architectures a compiled CUDA library carries, and which GPUs they serve.

Device code lies in the ELF section ``.nv_fatbin`` (of code that was never device-linked, ``__nv_relfatbin``), one
fat binary behind the other. NVIDIA publishes no description; this layout, all little endian, is from experiment::

    fat binary  u32 magic 0xBA55ED50, u16 version 1, u16 header size (16), u64 size of the entries that follow
    entry       +0 u16 kind (1 PTX, 2 SASS, 8 LTO code), +4 u32 header size (64 to 120), +8 u64 padded payload size,
                +28 u32 architecture (compute capability x 10), +40 u64 flags

Flags: bit 20 is the suffix ``a``, bit 21 the suffix ``f`` (``a`` wins); bits 13 and 15 say that the payload is
compressed with LZ4 or zstd. So no payload is read. Found by compiling with nvcc 13.0 (every architecture it has,
-compress-mode, -rdc, -G, LTO) and by flipping each flag bit before cuobjdump 13.2; held against cuobjdump 12.4 and
13.2 on libraries of the toolkits 11.8 to 13.3.
"""

from __future__ import annotations

import mmap
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from toolchain.base.command import run
from toolchain.base.errors import ArtifactError, CommandError

Kind: TypeAlias = Literal["sass", "ptx"]

MAX_STEPS: Final = 1 << 20
"""Headers that are read before a library is refused; libcublasLt 13.0, 540 MB, has under 9,000."""

_SECTIONS: Final = (b".nv_fatbin", b"__nv_relfatbin")  # the second counts where the first is not: so does cuobjdump
_ELF_64_LITTLE: Final = b"\x7fELF\x02\x01"
_NO_BYTES: Final = 8  # SHT_NOBITS: a section without bytes in the file, as in separate debug files
_FATBIN_MAGIC: Final = 0xBA55ED50
_KINDS: Final[dict[int, Kind]] = {1: "ptx", 2: "sass"}
_A, _F = 1 << 20, 1 << 21

_ELF_HEADER: Final = struct.Struct("<40x Q 10x HHH")  # offset of the section table; entry size, count, names' index
_ELF_SECTION: Final = struct.Struct("<II 16x QQ 24x")  # name, type; offset, size
_FATBIN: Final = struct.Struct("<IHHQ")
_ENTRY: Final = struct.Struct("<H 2x IQ 12x I 8x Q")  # kind, header size, payload size, architecture, flags

_REPORTED: Final = re.compile(r"^Fatbin (elf|ptx) code:\n=+\narch = sm_(\d{2,3}[af]?)$", re.MULTILINE)
_REPORT_CHARS: Final = 1 << 25  # cuobjdump writes 116 characters an entry

# Family-Specific Compatibility in the CUDA Programming Guide (Compute Capabilities, 13.0). It says that families may
# grow; one that is not here is its own capability alone.
_FAMILIES: Final[dict[str, frozenset[tuple[int, int]]]] = {
    "100f": frozenset({(10, 0), (10, 3)}),
    "120f": frozenset({(12, 0), (12, 1)}),
}
# Tegra (Jetson, Drive), among which and between which and the others no SASS is shared: CUDA C++ Programming Guide,
# Binary Compatibility.
_TEGRA: Final = frozenset({(3, 2), (5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)})


@dataclass(frozen=True, kw_only=True)
class DeviceCode:
    """Code for one architecture; ``arch`` is its compute capability without the dot, with its suffix: "86", "90a".

    Sorts by number, then by suffix ("90", "90a", "100", "100f"), then by kind.
    """

    arch: str
    kind: Kind

    @property
    def capability(self) -> tuple[int, int]:
        """Such as (9, 0)."""
        number = int(self.arch.rstrip("af"))
        return number // 10, number % 10

    @property
    def suffix(self) -> str:
        """Empty, "a" (that capability only) or "f" (its family)."""
        return self.arch.lstrip("0123456789")

    def __lt__(self, other: DeviceCode) -> bool:
        return (self.capability, self.suffix, self.kind) < (other.capability, other.suffix, other.kind)


def device_code(library: Path, *, cuobjdump: Path | None = None) -> tuple[DeviceCode, ...]:
    """The architectures in ``library``, sorted, each once: what any of its kernels has, not what all of them have.

    ``cuobjdump`` is asked where one is given; where it refuses (13.2 does at code for sm_35) and where none is given,
    the fat binary itself is read. It is asked for its plain listing, as --list-elf leaves the suffix f away; one that
    is older than the suffix (12.4 is) leaves it away there too, so pass the one that belongs to nvcc. Raises
    ArtifactError when ``library`` is no 64-bit little-endian ELF, is cut short or damaged, or has no SASS and no PTX;
    MissingError when there is no program at ``cuobjdump``.
    """
    reported = _ask(cuobjdump, library) if cuobjdump else frozenset()
    found = reported or _read(library)
    if not found:
        raise _refused(library, "has no GPU code", f"no SASS and no PTX in {' or '.join(map(bytes.decode, _SECTIONS))}")
    return tuple(sorted(found))


def find_cuobjdump(toolkit_bin: Path | None) -> Path | None:
    """cuobjdump in ``toolkit_bin`` (where nvcc is), else on PATH, else None."""
    beside = shutil.which("cuobjdump", path=str(toolkit_bin)) if toolkit_bin else None
    found = beside or shutil.which("cuobjdump")
    return Path(found) if found else None


def serves(codes: Iterable[DeviceCode], capability: tuple[int, int]) -> str | None:
    """How a GPU of ``capability`` is served: "sass 86" or "ptx 80 (compiled at first use)"; None when it is not.

    SASS comes before PTX, a higher capability before a lower one, the more special of two equal ones first. After
    NVIDIA's Blackwell Compatibility Guide (1.2) and the CUDA C++ Programming Guide (Binary Compatibility, PTX
    Compatibility, Feature Availability): SASS runs on its major number with an equal or higher minor one, but on and
    from Tegra only on its own; PTX is compiled on any equal or higher capability; of both, ``a`` runs on that
    capability alone and ``f`` in its family. That the driver knows the PTX's version is not looked at.
    """
    best = max(
        (code for code in codes if _runs(code, capability)),
        key=lambda code: (code.kind == "sass", code.capability, " fa".index(code.suffix or " ")),
        default=None,
    )
    if best is None:
        return None
    return f"{best.kind} {best.arch}" + (" (compiled at first use)" if best.kind == "ptx" else "")


def _runs(code: DeviceCode, capability: tuple[int, int]) -> bool:
    own = code.capability
    if own == capability:
        return True
    match code.suffix, code.kind:
        case "a", _:
            return False
        case "f", _:
            return capability in _FAMILIES.get(code.arch, ())
        case _, "ptx":
            return own < capability
        case _:
            return own[0] == capability[0] and own < capability and not {own, capability} & _TEGRA


def _ask(cuobjdump: Path, library: Path) -> frozenset[DeviceCode]:
    """What cuobjdump lists; nothing when it fails, which it also does where there is no device code.

    Nor when it warns: stderr may then lie in the middle of a line.
    """
    try:
        listing = run([cuobjdump, library], what=f"list the GPU code of {library.name}", keep=_REPORT_CHARS).output
    except CommandError:
        return frozenset()
    if "cuobjdump warning" in listing:
        return frozenset()
    kinds: dict[str, Kind] = {"elf": "sass", "ptx": "ptx"}
    return frozenset(DeviceCode(arch=arch, kind=kinds[kind]) for kind, arch in _REPORTED.findall(listing))


def _read(library: Path) -> frozenset[DeviceCode]:
    try:
        with library.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise _refused(library, "cannot be read", str(error)) from error
    with mapped:
        return _Library(library, mapped).codes()


class _Section(NamedTuple):
    name: bytes
    start: int
    end: int


class _Library:
    """The bytes of one library; every offset that it states is checked before it is followed."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.mapped = mapped

    def codes(self) -> frozenset[DeviceCode]:
        if self.mapped[: len(_ELF_64_LITTLE)] != _ELF_64_LITTLE:
            raise _refused(self.path, "is no 64-bit ELF library", f"it begins with {self.mapped[:6]!r}")
        sections, steps = list(self._sections()), iter(range(MAX_STEPS))
        for name in _SECTIONS:
            if named := [section for section in sections if section.name == name]:
                return frozenset(code for section in named for code in self._walk(section, steps))
        return frozenset()

    def _sections(self) -> Iterator[_Section]:
        """Those sections that may hold device code."""
        table, entry_size, count, names_index = self._unpack(_ELF_HEADER, 0, len(self.mapped), "the ELF header")
        if table == 0:
            raise _refused(self.path, "has no section table", "its ELF header names none; was it stripped of it?")
        if entry_size != _ELF_SECTION.size or not names_index < count:
            raise self._damaged(f"section table: {count} entries of {entry_size} bytes, names in {names_index}")
        size = len(self.mapped)
        headers = [
            self._unpack(_ELF_SECTION, table + _ELF_SECTION.size * index, size, f"section {index}")
            for index in range(count)
        ]
        _, _, names, names_size = headers[names_index]
        self._check(names, names_size, size, "the section names")
        for name_offset, type_, start, length in headers:
            name = next((known for known in _SECTIONS if self._named(names + name_offset, known)), None)
            if name and type_ != _NO_BYTES:
                self._check(start, length, size, name.decode())
                yield _Section(name, start, start + length)

    def _named(self, at: int, name: bytes) -> bool:
        return self.mapped[at : at + len(name) + 1] == name + b"\0"

    def _walk(self, section: _Section, steps: Iterator[int]) -> Iterator[DeviceCode]:
        """The code of every entry of every fat binary, in so many ``steps`` as are left for the whole library."""
        at = body_end = section.start
        for _ in steps:
            if at == section.end:
                return
            if at < body_end:
                kind, header, payload, arch, flags = self._unpack(_ENTRY, at, body_end, "an entry")
                if header < _ENTRY.size:
                    raise self._damaged(f"an entry's header of {header} bytes at offset {at}")
                self._check(at, header + payload, body_end, "an entry")
                if known := _KINDS.get(kind):
                    yield DeviceCode(arch=self._arch(arch, flags, at), kind=known)
                at += header + payload
            elif not any(self.mapped[at : min(at + 8, section.end)]):  # what the linker puts in for alignment
                at = min(at + 8, section.end)
            else:
                magic, version, header, body = self._unpack(_FATBIN, at, section.end, "a fat binary's header")
                if magic != _FATBIN_MAGIC or version != 1 or header < _FATBIN.size:
                    evidence = f"magic {magic:#x}, version {version}, header of {header} bytes at offset {at}"
                    raise self._damaged(f"no fat binary as nvcc writes it: {evidence}")
                self._check(at, header + body, section.end, "a fat binary")
                at += header
                body_end = at + body
        raise self._damaged(f"more than {MAX_STEPS} headers in {section.name.decode()}")

    def _arch(self, number: int, flags: int, at: int) -> str:
        if not 10 <= number <= 999:
            raise self._damaged(f"architecture {number} at offset {at}")
        return f"{number}{'a' if flags & _A else 'f' if flags & _F else ''}"

    def _unpack(self, layout: struct.Struct, at: int, end: int, what: str) -> tuple[Any, ...]:
        self._check(at, layout.size, end, what)
        return layout.unpack_from(self.mapped, at)

    def _check(self, start: int, length: int, end: int, what: str) -> None:
        if start + length > end:
            raise self._damaged(f"{what}: {length} bytes at offset {start}, but the bytes end at {end}")

    def _damaged(self, evidence: str) -> ArtifactError:
        return _refused(self.path, "is cut short or damaged", evidence)


def _refused(library: Path, verdict: str, evidence: str) -> ArtifactError:
    hint = "make one with `./inv build --cuda`, or name the library that holds the GPU code"
    return ArtifactError(f"{library.name} {verdict}", evidence=f"{library}: {evidence}", hint=hint)
