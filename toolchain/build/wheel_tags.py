"""Which part of a wheel's tags does not fit a Python: the system, the processor, the C library, the Python."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.tags import Tag

LEGACY_MANYLINUX = {"1": (2, 5), "2010": (2, 12), "2014": (2, 17)}
"""The glibc of manylinux tags that name a year (PEP 600, "Legacy manylinux tags")."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A platform tag, parsed. ``library`` is what sets the version: the C library, or macOS itself; None when the
    tag does not tell.
    """

    system: str
    arch: str
    library: Literal["glibc", "musl", "macOS"] | None = None
    version: tuple[int, int] = (0, 0)


def platform_mismatch(offered: Collection[Tag], own: Sequence[Tag]) -> str:
    """Why none of the wheel's platforms is one of ours, in one sentence; empty when one is.

    Of several platforms the nearest miss is told.
    """
    ours = {tag.platform for tag in own}
    named = {tag.platform for tag in offered}
    if named & ours:
        return ""
    here = [parse_platform(name) for name in ours - {"any"}]
    first = next((parse_platform(tag.platform) for tag in own if tag.platform != "any"), parse_platform("unknown"))
    return max(_miss(parse_platform(name), first, here) for name in named)[2]


def python_mismatch(offered: Collection[Tag], own: Sequence[Tag]) -> str:
    """Why none of the wheel's interpreters and ABIs is one of ours, in one sentence; empty when one is."""
    ours = {(tag.interpreter, tag.abi) for tag in own}
    if any((tag.interpreter, tag.abi) in ours for tag in offered):
        return ""
    first = own[0]
    if abis := sorted({tag.abi for tag in offered if tag.interpreter == first.interpreter}):
        return f"built for the ABI {' or '.join(abis)}; this Python has {first.abi}"
    names = sorted({f"{interpreter_name(tag.interpreter)}{' or newer' * (tag.abi == 'abi3')}" for tag in offered})
    return f"made for {' or '.join(names)}; this is {interpreter_name(first.interpreter)}"


def parse_platform(name: str) -> Platform:
    """``manylinux_2_17_x86_64`` is Linux on x86_64 with glibc 2.17; an unknown system keeps its name."""
    if found := re.fullmatch(r"(many|musl)linux_(\d+)_(\d+)_(\w+)", name):
        kind, major, minor, arch = found.groups()
        library: Literal["glibc", "musl"] = "glibc" if kind == "many" else "musl"
        return Platform(system="Linux", arch=arch, library=library, version=(int(major), int(minor)))
    if (found := re.fullmatch(r"manylinux(\d+)_(\w+)", name)) and found[1] in LEGACY_MANYLINUX:
        return Platform(system="Linux", arch=found[2], library="glibc", version=LEGACY_MANYLINUX[found[1]])
    if found := re.fullmatch(r"linux_(\w+)", name):
        return Platform(system="Linux", arch=found[1])
    if found := re.fullmatch(r"macosx_(\d+)_(\d+)_(\w+)", name):
        return Platform(system="macOS", arch=found[3], library="macOS", version=(int(found[1]), int(found[2])))
    if found := re.fullmatch(r"win(32|_\w+)", name):
        return Platform(system="Windows", arch=found[1].lstrip("_"))
    return Platform(system=name, arch="")


def interpreter_name(tag: str) -> str:
    """``cp311`` in words, ``CPython 3.11``."""
    if not (found := re.fullmatch(r"(cp|pp|py)(\d)(\d*)", tag)):
        return tag
    kind, major, minor = found.groups()
    name = {"cp": "CPython", "pp": "PyPy", "py": "Python"}[kind]
    return f"{name} {major}{'.' * bool(minor)}{minor}"


def _miss(wheel: Platform, first: Platform, here: Sequence[Platform]) -> tuple[int, tuple[int, int], str]:
    """How near ``wheel`` comes to this machine (more is nearer), and what is in its way."""
    if wheel.system != first.system:
        return 0, (0, 0), f"made for {wheel.system}; this is {first.system}"
    if wheel.arch not in {platform.arch for platform in here}:
        return 1, (0, 0), f"made for {wheel.arch} processors; this is {first.arch}"
    versions = [platform.version for platform in here if platform.library == wheel.library]
    major, minor = wheel.version
    if wheel.library is None or not versions:
        others = sorted({platform.library for platform in here if platform.library})
        own = f"this one has {others[0]}" if others else "this one's C library is not known"
        return 2, (0, 0), f"made for systems with {wheel.library or 'another C library'}; {own}"
    newest = max(versions)
    return 3, (-major, -minor), f"needs {wheel.library} {major}.{minor}; here {newest[0]}.{newest[1]}"
