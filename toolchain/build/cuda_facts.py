"""What NVIDIA documents about CUDA releases: architectures, host compilers, drivers.

A toolkit at hand is asked itself (``nvcc --list-gpu-arch``, ``crt/host_config.h``); these tables say what to
install when none fits, and describe toolkits that are not on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping

Release = tuple[int, int]
"""A CUDA release, (12, 4)."""

ARCHITECTURES: Mapping[str, tuple[Release, Release | None]] = {
    "50": ((6, 5), (12, 9)),
    "52": ((6, 5), (12, 9)),
    "53": ((7, 0), (12, 9)),
    "60": ((8, 0), (12, 9)),
    "61": ((8, 0), (12, 9)),
    "62": ((8, 0), (12, 9)),
    "70": ((9, 0), (12, 9)),
    "72": ((9, 1), (12, 9)),
    "75": ((10, 0), None),
    "80": ((11, 0), None),
    "86": ((11, 1), None),
    "87": ((11, 4), None),
    "88": ((13, 0), None),
    "89": ((11, 8), None),
    "90": ((11, 8), None),
    "100": ((12, 8), None),
    "101": ((12, 8), (12, 9)),
    "103": ((12, 9), None),
    "110": ((13, 0), None),
    "120": ((12, 8), None),
    "121": ((12, 9), None),
}
"""First and last release whose nvcc compiles for an architecture (CUDA Toolkit release notes, sections "New
features" and "Deprecated or dropped"; 13.0 checked against its own ``nvcc --list-gpu-arch``)."""

GCC_MAX: Mapping[Release, int] = {
    (11, 0): 9, (11, 1): 10, (11, 5): 11, (12, 0): 12, (12, 4): 13, (12, 8): 14, (13, 0): 15,
}  # fmt: skip
"""Newest major gcc that nvcc takes as host compiler, from that release on (CUDA Installation Guide for Linux,
table "Native Linux Distribution Support", and the ``#error`` in each release's ``crt/host_config.h``)."""

CLANG_MAX: Mapping[Release, int] = {
    (11, 0): 9, (11, 1): 10, (11, 2): 11, (11, 5): 12, (11, 6): 13, (11, 8): 14, (12, 1): 15, (12, 3): 16,
    (12, 4): 17, (12, 6): 18, (12, 8): 19, (13, 0): 20,
}  # fmt: skip
"""The same for clang."""

DRIVER_MINIMUM: Mapping[int, str] = {11: "450", 12: "525", 13: "580"}
"""Oldest driver branch that runs programs of a major CUDA release, whatever their minor one (CUDA Compatibility,
"Minor Version Compatibility", table 1). Machine code only: PTX of a newer minor release is not taken."""

MINIMUM_RELEASE: Release = (11, 0)
"""llama.cpp's kernels are C++17, which nvcc knows since 11.0."""

PORTABLE_ARCHITECTURES = ("61-virtual", "70-virtual", "75-real", "80-real", "86-real", "89-real", "90", "120-real")
"""For a build that is handed on, as far as the toolkit knows them: machine code for the GPUs that people have
(RTX 20, A100, RTX 30, RTX 40, H100, RTX 50); PTX for older ones, and of 90 for those to come."""


def newest_compiler(release: Release, family: str) -> int:
    """The newest major version of ``gcc`` or ``clang`` that nvcc of ``release`` takes."""
    table = GCC_MAX if family == "gcc" else CLANG_MAX
    return max((most for since, most in table.items() if since <= release), default=0)


def releases_for(arch: str) -> str:
    """Which toolkits compile for ``arch``, in words: ``CUDA 12.8 or newer``, ``CUDA 8.0 to 12.9``."""
    first, last = ARCHITECTURES[arch]
    return f"CUDA {shown(first)} to {shown(last)}" if last else f"CUDA {shown(first)} or newer"


def releases_for_gcc(major: int) -> str:
    """Which toolkits take gcc ``major``: ``CUDA 12.8 or newer``; empty when none is known to."""
    first = min((since for since, most in GCC_MAX.items() if most >= major), default=None)
    return f"CUDA {shown(first)} or newer" if first else ""


def known_architectures(release: Release) -> frozenset[str]:
    """Architectures that nvcc of ``release`` compiles for, by the table."""
    return frozenset(
        arch for arch, (first, last) in ARCHITECTURES.items() if first <= release and (not last or release <= last)
    )


def shown(release: Release) -> str:
    """``12.4``."""
    return f"{release[0]}.{release[1]}"
