"""Which of the wheels that somebody else built fit a machine, why the others do not, and which is the best.

Pure: a described machine and a list of offers go in, ordered verdicts with their reasons come out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.tags import Tag
from packaging.version import Version

from toolchain.build.cuda_facts import known_architectures, shown
from toolchain.build.fatbin import DeviceCode, Kind, serves
from toolchain.build.wheel_offer import CpuLevel, Flavour, Offer
from toolchain.build.wheel_tags import platform_mismatch, python_mismatch

CPU_FLAGS: Mapping[CpuLevel, frozenset[str]] = {
    "basic": frozenset(),
    "avx": frozenset({"avx"}),
    "avx2": frozenset({"avx", "avx2", "fma", "f16c"}),
    "avx512": frozenset({"avx", "avx2", "fma", "f16c", "avx512f", "avx512bw"}),
}
"""What the folders of the older index mean, as Linux names CPU flags: its build scripts turn LLAMA_AVX2, LLAMA_FMA
and LLAMA_F16C off for AVX, and all with LLAMA_AVX for basic; LLAMA_AVX512 of those years is AVX512F and AVX512BW."""

MINOR_COMPATIBILITY_SINCE = (11, 0)
"""Since CUDA 11 a program runs on every driver of its own major release, and as ever on every newer driver
(NVIDIA, CUDA Compatibility, "Minor Version Compatibility"); older ones need a driver of their release."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The machine that is to use the wheel, and what was asked for.

    ``tags`` are those of the Python that will import it, most specific first (``packaging.tags.sys_tags()``);
    ``cpu_flags`` as in /proc/cpuinfo; ``driver_cuda`` the newest CUDA that the NVIDIA driver runs, None without
    one; ``capabilities`` those of the visible GPUs. ``want`` None takes the best of CUDA, Metal and CPU.
    """

    tags: tuple[Tag, ...]
    cpu_flags: frozenset[str] = frozenset()
    driver_cuda: tuple[int, int] | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    version: SpecifierSet | None = None
    want: Flavour | None = None

    @property
    def gpu_visible(self) -> bool:
        return self.driver_cuda is not None and bool(self.capabilities)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``rejected`` says why an offer does not fit; None with ``rank``, 1 being the best. ``note`` is what to know
    of one that fits, and may be empty.
    """

    offer: Offer
    rejected: str | None = None
    rank: int | None = None
    note: str = ""


def judge(offers: Iterable[Offer], target: Target) -> tuple[Verdict, ...]:
    """Every offer with its verdict: those that fit first, the best of them first; then the nearest misses.

    An accelerator that is there comes before the CPU, then the newest version, then the newest CUDA that needs
    no minor version compatibility, then the most of the CPU's features.
    """
    fitting: list[Offer] = []
    missed: list[tuple[int, Offer, str]] = []
    for offer in offers:
        for stage, check in enumerate(_CHECKS):
            if why := check(offer, target):
                missed.append((stage, offer, why))
                break
        else:
            fitting.append(offer)
    fitting.sort(key=lambda offer: (offer.filename, offer.location))
    fitting.sort(key=lambda offer: _merit(offer, target), reverse=True)
    missed.sort(key=lambda miss: (miss[0], miss[1].version, miss[1].filename), reverse=True)
    return (
        *(Verdict(offer=one, rank=rank, note=_note(one, target)) for rank, one in enumerate(fitting, 1)),
        *(Verdict(offer=one, rejected=why) for _, one, why in missed),
    )


def rejections(verdicts: Iterable[Verdict]) -> tuple[tuple[str, int], ...]:
    """Each reason with how many wheels it cost, the nearest misses first."""
    return tuple(Counter(verdict.rejected for verdict in verdicts if verdict.rejected).items())


def _unasked_version(offer: Offer, target: Target) -> str:
    if target.version is not None and not target.version.contains(offer.version, prereleases=True):
        return f"version {offer.version.public}; asked for {target.version}"
    if offer.yanked is not None:
        return f"withdrawn by its index{': ' * bool(offer.yanked)}{offer.yanked}"
    return ""


def _other_platform(offer: Offer, target: Target) -> str:
    return platform_mismatch(offer.tags, target.tags)


def _other_python(offer: Offer, target: Target) -> str:
    return python_mismatch(offer.tags, target.tags)


def _other_flavour(offer: Offer, target: Target) -> str:
    made_for = {"rocm": "AMD GPUs (ROCm)", "cuda": "CUDA", "cpu": "the CPU"}.get(offer.flavour, offer.flavour)
    if target.want:
        if offer.flavour == "unstated" and target.want != "cpu":
            return f"neither its name nor its folder says that it is made for {target.want}"
        return f"made for {made_for}; asked for {target.want}" if offer.flavour not in (target.want, "unstated") else ""
    if offer.flavour == "cuda" and not target.gpu_visible:
        return f"made for {_cuda(offer)}; no NVIDIA GPU is visible here"
    return f"made for {made_for}, which was not asked for" if offer.flavour in ("rocm", "vulkan", "sycl") else ""


def _newer_cuda(offer: Offer, target: Target) -> str:
    if offer.cuda is None or target.driver_cuda is None:
        return ""
    by_major = offer.cuda >= MINOR_COMPATIBILITY_SINCE and offer.cuda[0] <= target.driver_cuda[0]
    if by_major or offer.cuda <= target.driver_cuda:
        return ""
    return f"{_cuda(offer)} is more than the driver can run ({shown(target.driver_cuda)})"


def _no_code_for_gpu(offer: Offer, target: Target) -> str:
    if offer.flavour != "cuda":
        return ""
    for capability in target.capabilities:
        jit = target.driver_cuda is None or offer.cuda is None or offer.cuda <= target.driver_cuda
        if offer.architectures and serves(_device_code(offer.architectures, jit=jit), capability) is None:
            named = ", ".join(offer.architectures)
            return f"holds code for {named} only; a GPU here has compute capability {shown(capability)}"
        if offer.cuda and offer.cuda >= (12, 0):  # the table of architectures leaves out what CUDA 12 no longer has
            lowest = min(int(arch) for arch in known_architectures(offer.cuda))
            if capability < (oldest := divmod(lowest, 10)):
                return (
                    f"{_cuda(offer)} makes no code for compute capabilities below {shown(oldest)}; "
                    f"a GPU here has {shown(capability)}"
                )
    return ""


def _lacking_cpu(offer: Offer, target: Target) -> str:
    if not offer.cpu or not any(tag.platform.endswith(("x86_64", "amd64")) for tag in offer.tags):
        return ""
    lacking = sorted(CPU_FLAGS[offer.cpu] - target.cpu_flags)
    if not lacking:
        return ""
    named = ", ".join(flag.upper() for flag in lacking)
    return f"built with {offer.cpu.upper()}; this CPU does not have {named}"


_CHECKS: tuple[Callable[[Offer, Target], str], ...] = (
    _unasked_version, _other_platform, _other_python, _other_flavour, _newer_cuda, _no_code_for_gpu, _lacking_cpu,
)  # fmt: skip


def _device_code(architectures: Iterable[str], *, jit: bool) -> tuple[DeviceCode, ...]:
    """``sm86``, ``sm90a`` and ``ptx75`` as code; PTX only for a driver as new as the toolkit (``jit``)."""
    kinds: Mapping[str, Kind] = {"sm": "sass", "ptx": "ptx"}
    named = [re.fullmatch(r"([a-z]+)(\d+[af]?)", arch) for arch in architectures]
    codes = [DeviceCode(arch=found[2], kind=kinds[found[1]]) for found in named if found and found[1] in kinds]
    return tuple(code for code in codes if jit or code.kind == "sass")


def _merit(offer: Offer, target: Target) -> tuple[object, ...]:
    accelerated = offer.flavour not in ("cpu", "unstated")
    within_driver = offer.cuda is not None and (target.driver_cuda is None or offer.cuda <= target.driver_cuda)
    level = [*CPU_FLAGS].index(offer.cpu) if offer.cpu else 0
    order = {tag: number for number, tag in enumerate(target.tags)}
    specific = -min((order[tag] for tag in offer.tags if tag in order), default=len(order))
    version = Version(offer.version.public)
    return accelerated, version, within_driver, offer.cuda or (0, 0), level, offer.flavour != "unstated", specific


def _note(offer: Offer, target: Target) -> str:
    notes: list[str] = []
    if offer.flavour == "unstated":
        notes.append("neither its name nor its folder says what it is built for")
    if offer.flavour == "cuda" and not target.gpu_visible:
        notes.append("no NVIDIA GPU is visible here to run it on")
    elif offer.flavour == "cuda" and offer.cuda is None:
        notes.append("it does not say for which CUDA it is made")
    elif offer.cuda and target.driver_cuda and offer.cuda > target.driver_cuda:
        driver = shown(target.driver_cuda)
        notes.append(f"{_cuda(offer)} runs on a driver of {driver} by minor version compatibility, without PTX")
    if re.search(r"\.g[0-9a-f]{7}\.b[0-9a-f]{12}$", local := offer.version.local or "") and "portable" not in local:
        notes.append("a build of this project for, perhaps, only the CPU that it was made on")
    if all(tag.platform.startswith("linux_") for tag in offer.tags):
        notes.append("its platform tag does not say which C library it needs")
    return "; ".join(notes)


def _cuda(offer: Offer) -> str:
    return f"CUDA {shown(offer.cuda)}" if offer.cuda else "CUDA"
