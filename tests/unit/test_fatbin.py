"""Which GPU code a library carries, read from described libraries, and which GPUs it serves."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from tests.described_fatbin import LTO, PTX, SASS, ZSTD, A, F, elf, entry, fatbin, library
from toolchain.base.errors import ArtifactError, MissingError
from toolchain.build.fatbin import MAX_STEPS, DeviceCode, device_code, find_cuobjdump, serves

LISTING = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
host = linux

Fatbin elf code:
================
arch = sm_103f
code version = [1,8]

Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
compressed

Fatbin nvvm code:
================
arch = sm_75
"""


def code(text: str) -> DeviceCode:
    """ "sass 90a" as DeviceCode."""
    kind, arch = text.split()
    return DeviceCode(arch=arch, kind="sass" if kind == "sass" else "ptx")


def told(path: Path) -> list[str]:
    return [f"{found.kind} {found.arch}" for found in device_code(path)]


def program(path: Path, text: str) -> Path:
    """A shell script at ``path`` in cuobjdump's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_architectures_are_sorted_by_number_and_told_once(tmp_path: Path) -> None:
    one = fatbin(entry(SASS, 120), entry(SASS, 75), entry(SASS, 86))
    two = fatbin(entry(SASS, 86), entry(SASS, 100))
    assert told(library(tmp_path, one, two)) == ["sass 75", "sass 86", "sass 100", "sass 120"]


def test_ptx_and_sass_of_one_architecture_are_told_apart(tmp_path: Path) -> None:
    assert told(library(tmp_path, fatbin(entry(SASS, 90), entry(PTX, 90, ZSTD)))) == ["ptx 90", "sass 90"]
    assert told(library(tmp_path, fatbin(entry(PTX, 80)))) == ["ptx 80"]


def test_suffixes_are_told(tmp_path: Path) -> None:
    entries = [entry(SASS, 90), entry(SASS, 90, A), entry(PTX, 90, A | ZSTD), entry(SASS, 100, F), entry(SASS, 103, A)]
    assert told(library(tmp_path, fatbin(*entries))) == ["sass 90", "ptx 90a", "sass 90a", "sass 100f", "sass 103a"]


def test_longer_headers_and_payloads_of_any_size_are_stepped_over(tmp_path: Path) -> None:
    entries = [
        entry(SASS, 100, header=112, payload=b"\x7fELF" * 999),
        entry(PTX, 100, header=80, payload=b""),
        entry(SASS, 89, header=72, payload=bytes(8)),
    ]
    assert told(library(tmp_path, fatbin(*entries))) == ["sass 89", "ptx 100", "sass 100"]


def test_zeros_between_fat_binaries_are_stepped_over(tmp_path: Path) -> None:
    assert told(library(tmp_path, fatbin(entry(SASS, 80)), bytes(24), fatbin(), fatbin(entry(SASS, 86)), bytes(4))) == [
        "sass 80",
        "sass 86",
    ]


def test_code_for_the_link_step_is_not_gpu_code(tmp_path: Path) -> None:
    assert told(library(tmp_path, fatbin(entry(LTO, 75), entry(SASS, 90)))) == ["sass 90"]
    with pytest.raises(ArtifactError, match="has no GPU code"):
        device_code(library(tmp_path, fatbin(entry(LTO, 75))))


def test_code_that_awaits_device_linking_counts_only_where_there_is_no_other(tmp_path: Path) -> None:
    relocatable, linked = fatbin(entry(PTX, 90, A)), fatbin(entry(SASS, 90, A))
    both = tmp_path / "libboth.so"
    both.write_bytes(elf(("__nv_relfatbin", relocatable), (".nv_fatbin", linked)))
    assert told(both) == ["sass 90a"]
    assert told(library(tmp_path, relocatable, section="__nv_relfatbin")) == ["ptx 90a"]


@pytest.mark.parametrize("section", [".nv_fatbin.x", ".nv_fatbi", ".rodata"])
def test_a_library_without_the_section_has_no_gpu_code(tmp_path: Path, section: str) -> None:
    with pytest.raises(ArtifactError, match="has no GPU code") as caught:
        device_code(library(tmp_path, fatbin(entry(SASS, 90)), section=section))
    assert "--cuda" in caught.value.hint


def test_a_debug_file_without_the_bytes_has_no_gpu_code(tmp_path: Path) -> None:
    path = tmp_path / "lib.so.debug"
    path.write_bytes(elf((".nv_fatbin", fatbin(entry(SASS, 90))), nobits=frozenset({".nv_fatbin"})))
    with pytest.raises(ArtifactError, match="has no GPU code"):
        device_code(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"GGUF" + bytes(200), id="another format"),
        pytest.param(b"\x7fELF\x01\x01\x01" + bytes(200), id="32-bit"),
        pytest.param(b"\x7fELF\x02\x02\x01" + bytes(200), id="big-endian"),
        pytest.param(b"\x7fELF\x02\x01", id="only the first bytes"),
        pytest.param(b"\x7fELF\x02\x01\x01" + bytes(200), id="no section table"),
    ],
)
def test_what_is_no_64_bit_elf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "libother.so"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"libother\.so (is|has|cannot)"):
        device_code(path)


def test_a_missing_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"libnone\.so cannot be read"):
        device_code(tmp_path / "libnone.so")


def test_a_library_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = library(tmp_path, fatbin(entry(SASS, 90))).read_bytes()
    path = tmp_path / "libcut.so"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            device_code(path)


HUGE = (1 << 64) - 8


@pytest.mark.parametrize(
    ("at", "layout", "value"),
    [
        pytest.param(0x28, "<Q", HUGE, id="section table beyond the end"),
        pytest.param(0x3A, "<H", 0, id="section entries of no bytes"),
        pytest.param(0x3C, "<H", 0xFFFF, id="more sections than bytes"),
        pytest.param(0x3C, "<H", 0, id="no sections"),
        pytest.param(0x3E, "<H", 0xFFFF, id="names in a section that is not there"),
    ],
)
def test_a_false_elf_header_is_refused(tmp_path: Path, at: int, layout: str, value: int) -> None:
    path = library(tmp_path, fatbin(entry(SASS, 90)))
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, at, value)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        device_code(path)


@pytest.mark.parametrize("section", [2, 4], ids=["fat binary", "names"])
@pytest.mark.parametrize(
    ("at", "value"), [(24, HUGE), (32, HUGE), (32, 1 << 40)], ids=["offset", "size that wraps", "size"]
)
def test_a_section_beyond_the_end_is_refused(tmp_path: Path, section: int, at: int, value: int) -> None:
    path = library(tmp_path, fatbin(entry(SASS, 90)))
    content = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", content, 0x28)
    struct.pack_into("<Q", content, table + 64 * section + at, value)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        device_code(path)


@pytest.mark.parametrize(
    "fatbins",
    [
        pytest.param([fatbin(entry(SASS, 90, header=0))], id="entry header of no bytes"),
        pytest.param([fatbin(entry(SASS, 90, header=40, size=32))], id="entry header too short for its fields"),
        pytest.param([fatbin(entry(SASS, 90, header=0, size=0, payload=b""))], id="entry of no bytes"),
        pytest.param([fatbin(entry(SASS, 90, size=HUGE))], id="payload size that wraps"),
        pytest.param([fatbin(entry(SASS, 90, size=25))], id="payload beyond its fat binary"),
        pytest.param([fatbin(entry(SASS, 90, size=25)), fatbin()], id="payload into the next fat binary"),
        pytest.param([fatbin(entry(SASS, 90), b"\0" * 8)], id="rest too short for an entry"),
        pytest.param([fatbin(entry(SASS, 90), size=HUGE)], id="fat binary size that wraps"),
        pytest.param([fatbin(entry(SASS, 90), size=1 << 40)], id="fat binary beyond its section"),
        pytest.param([fatbin(entry(SASS, 90)), b"\x50\xed\x55\xba"], id="rest too short for a fat binary"),
        pytest.param([fatbin(entry(SASS, 90), magic=0x1EE55A01)], id="the magic number of before CUDA 4"),
        pytest.param([fatbin(entry(SASS, 90), version=2)], id="another version"),
        pytest.param([fatbin(entry(SASS, 0))], id="architecture 0"),
        pytest.param([fatbin(entry(SASS, 0xFFFFFFFF))], id="architecture beyond any"),
    ],
)
def test_a_damaged_fat_binary_is_refused(tmp_path: Path, fatbins: list[bytes]) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        device_code(library(tmp_path, *fatbins))


def test_a_library_of_nothing_but_headers_is_refused_in_bounded_time(tmp_path: Path) -> None:
    half = fatbin() * (MAX_STEPS // 2 + 1)
    path = tmp_path / "libheaders.so"
    path.write_bytes(elf((".nv_fatbin", half), (".nv_fatbin", half)))
    with pytest.raises(ArtifactError, match="damaged") as caught:
        device_code(path)
    assert str(MAX_STEPS) in caught.value.evidence


def test_of_a_large_library_only_the_headers_are_touched(tmp_path: Path) -> None:
    """A tebibyte, all but its ends a hole in the file: to read it would end in MemoryError, or not at all."""
    tebibyte = 1 << 40
    first = fatbin(entry(SASS, 90, payload=b"", size=tebibyte), size=64 + tebibyte)
    small = library(tmp_path, first[:80], fatbin(entry(SASS, 86))).read_bytes()
    at = small.index(first[:80]) + 80
    table = bytearray(small[struct.unpack_from("<Q", small, 0x28)[0] :])
    for section in range(1, len(table) // 64):
        offset, size = struct.unpack_from("<QQ", table, 64 * section + 24)
        moved = (offset + tebibyte if offset >= at else offset), (size + tebibyte if section == 2 else size)
        struct.pack_into("<QQ", table, 64 * section + 24, *moved)
    path = tmp_path / "liblarge.so"
    with path.open("wb") as sink:
        sink.write(small[:0x28] + struct.pack("<Q", len(small) - len(table) + tebibyte) + small[0x30:at])
        sink.seek(tebibyte, 1)
        sink.write(small[at : len(small) - len(table)] + table)
    assert told(path) == ["sass 86", "sass 90"]


def test_cuobjdump_is_believed_where_there_is_one(tmp_path: Path) -> None:
    cuobjdump = program(tmp_path / "cuobjdump", f"cat <<'END'\n{LISTING}\nEND")
    found = device_code(library(tmp_path, fatbin(entry(SASS, 75))), cuobjdump=cuobjdump)
    assert found == (code("ptx 90"), code("sass 90a"), code("sass 103f"))


@pytest.mark.parametrize(
    "says",
    [
        pytest.param("echo \"Support for 'sm_35' has been removed.\" >&2; exit 1", id="refuses"),
        pytest.param("echo 'does not contain device code'; exit 255", id="finds nothing"),
        pytest.param(f"cat <<'END'\n{LISTING}\ncuobjdump warning : something\nEND", id="warns"),
    ],
)
def test_the_library_is_read_where_cuobjdump_has_no_clear_answer(tmp_path: Path, says: str) -> None:
    cuobjdump = program(tmp_path / "cuobjdump", says)
    assert device_code(library(tmp_path, fatbin(entry(SASS, 35))), cuobjdump=cuobjdump) == (code("sass 35"),)
    with pytest.raises(ArtifactError, match="has no GPU code"):
        device_code(library(tmp_path, section=".rodata"), cuobjdump=cuobjdump)


def test_a_cuobjdump_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cuobjdump is not there"):
        device_code(library(tmp_path, fatbin(entry(SASS, 90))), cuobjdump=tmp_path / "cuobjdump")


def test_cuobjdump_is_found_beside_nvcc_then_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = program(tmp_path / "path" / "cuobjdump", "exit 0")
    beside = program(tmp_path / "toolkit" / "cuobjdump", "exit 0")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_cuobjdump(beside.parent) == beside
    assert find_cuobjdump(tmp_path) == on_path
    assert find_cuobjdump(None) == on_path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_cuobjdump(None) is None
    assert shutil.which("cuobjdump") is None


@pytest.mark.parametrize(
    ("codes", "capability", "how"),
    [
        # SASS: the same major number, an equal or higher minor one
        ("sass 80", (8, 0), "sass 80"),
        ("sass 80", (8, 6), "sass 80"),
        ("sass 80", (8, 9), "sass 80"),
        ("sass 86", (8, 0), None),
        ("sass 89", (9, 0), None),
        ("sass 90", (10, 0), None),
        ("sass 100", (10, 3), "sass 100"),
        ("sass 120", (12, 1), "sass 120"),
        ("sass 121", (12, 0), None),
        # Tegra: its own only, both ways
        ("sass 87", (8, 7), "sass 87"),
        ("sass 80", (8, 7), None),
        ("sass 87", (8, 9), None),
        ("sass 70", (7, 2), None),
        ("sass 72", (7, 5), None),
        ("ptx 80", (8, 7), "ptx 80 (compiled at first use)"),
        # a: that capability alone
        ("sass 90a", (9, 0), "sass 90a"),
        ("sass 100a", (10, 3), None),
        ("sass 120a", (12, 1), None),
        ("ptx 90a", (9, 0), "ptx 90a (compiled at first use)"),
        ("ptx 90a", (10, 0), None),
        # f: its family
        ("sass 100f", (10, 0), "sass 100f"),
        ("sass 100f", (10, 3), "sass 100f"),
        ("sass 100f", (11, 0), None),
        ("sass 100f", (12, 0), None),
        ("sass 103f", (10, 0), None),
        ("sass 103f", (10, 3), "sass 103f"),
        ("sass 110f", (11, 0), "sass 110f"),
        ("ptx 120f", (12, 1), "ptx 120f (compiled at first use)"),
        ("ptx 100f", (12, 0), None),
        ("ptx 121f", (12, 0), None),
        # PTX: any equal or higher capability
        ("ptx 80", (8, 0), "ptx 80 (compiled at first use)"),
        ("ptx 80", (12, 0), "ptx 80 (compiled at first use)"),
        ("ptx 90", (8, 9), None),
        # of several: SASS first, then the nearest, then the more special
        ("ptx 86,sass 80", (8, 6), "sass 80"),
        ("sass 80,sass 86,sass 89,sass 90", (8, 9), "sass 89"),
        ("sass 80,sass 86", (8, 9), "sass 86"),
        ("ptx 75,ptx 90,sass 80", (12, 0), "ptx 90 (compiled at first use)"),
        ("sass 90,sass 90a", (9, 0), "sass 90a"),
        ("sass 120a,sass 120f,sass 120", (12, 0), "sass 120a"),
        ("sass 120a,sass 120f,sass 120", (12, 1), "sass 120f"),
        ("sass 90a,ptx 90", (12, 0), "ptx 90 (compiled at first use)"),
        ("", (9, 0), None),
    ],
)
def test_which_gpus_are_served_and_how(codes: str, capability: tuple[int, int], how: str | None) -> None:
    assert serves([code(text) for text in codes.split(",") if text], capability) == how
