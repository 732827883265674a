"""The CUDA solver: driver x toolkit x host compiler x architectures, settled and explained before cmake runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from toolchain.base.errors import ArtifactError, MissingError, UsageError
from toolchain.base.gpu import Gpu
from toolchain.base.machine import Compiler, Machine
from toolchain.build.cuda_facts import (
    ARCHITECTURES,
    DRIVER_MINIMUM,
    MINIMUM_RELEASE,
    PORTABLE_ARCHITECTURES,
    Release,
    known_architectures,
    newest_compiler,
    releases_for,
    releases_for_gcc,
)
from toolchain.build.fatbin import DeviceCode, Kind, serves
from toolchain.build.toolkit import NAMED, Toolkit

INDEX_RELEASE: Release = (13, 0)
"""The release that is taken from the package index where the machine has no toolkit: the one we are tested with."""


@dataclass(frozen=True, kw_only=True)
class CudaChoice:
    """What the solver settled. ``toolkit`` None: take INDEX_RELEASE from the package index.

    ``archs`` are written as cmake wants them (``89-real``, ``90``, ``75-virtual``); ``reasons`` say, one line
    each, why it is so and what was passed over.
    """

    toolkit: Toolkit | None
    host: Compiler
    archs: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def wanted(self) -> tuple[DeviceCode, ...]:
        """What the library must carry."""
        return _device_code(self.archs)


def choose_cuda(
    *, toolkits: Sequence[Toolkit], compilers: Sequence[Compiler], machine: Machine, asked: Sequence[str] = ()
) -> CudaChoice:
    """The newest toolkit that driver, GPUs and a host compiler allow; one that the user named, or none but it.

    ``asked`` are architectures as typed (75, 8.6, sm_90, 90-virtual, native, portable); empty: the visible GPUs',
    and without any the portable set. Raises MissingError with each toolkit's reason and what to install,
    UsageError for what is no architecture, ArtifactError when a visible GPU could not be served.
    """
    if machine.system != "Linux":
        raise MissingError(
            f"there is no CUDA for {machine.system}",
            hint="leave --cuda out: on a Mac llama.cpp uses the GPU through Metal by itself",
        )
    wanted, origin = _wanted(asked, machine.gpus)
    named = [toolkit for toolkit in toolkits if toolkit.found_by in NAMED][:1]
    candidates = named or sorted(toolkits, key=lambda toolkit: toolkit.release, reverse=True)
    passed_over: list[str] = []
    hints: list[str] = []
    for toolkit in candidates:
        try:
            archs = _known(wanted, toolkit.archs, toolkit.release)
            _require_driver(toolkit.release, archs, machine)
            host, host_reason = _host(toolkit, compilers)
        except MissingError as unfit:
            passed_over.append(f"{toolkit}: {unfit.message}")
            hints.append(unfit.hint)
            continue
        _require_served(archs, machine.gpus)
        chosen = [f"{toolkit}{', the newest that fits' if passed_over or len(candidates) > 1 else ''}"]
        return CudaChoice(
            toolkit=toolkit,
            host=host,
            archs=archs,
            reasons=(*chosen, host_reason, f"architectures {', '.join(archs)}: {origin}", *passed_over),
        )
    if candidates:
        raise MissingError(
            "no CUDA toolkit on this machine fits",
            evidence="\n".join(passed_over),
            hint=" ".join(dict.fromkeys(filter(None, hints))) + " (or `--cuda-toolkit index` takes one from the index)",
        )
    return from_index(compilers=compilers, machine=machine, asked=asked)


def from_index(*, compilers: Sequence[Compiler], machine: Machine, asked: Sequence[str] = ()) -> CudaChoice:
    """The same with the package index's toolkit; its limits are known before it is fetched."""
    wanted, origin = _wanted(asked, machine.gpus)
    archs = _known(wanted, known_architectures(INDEX_RELEASE), INDEX_RELEASE)
    _require_driver(INDEX_RELEASE, archs, machine)
    _require_served(archs, machine.gpus)
    newest = {family: newest_compiler(INDEX_RELEASE, family) for family in ("gcc", "clang")}
    host = next((c for c in compilers if c.major <= newest[c.family]), None)
    if host is None:
        raise MissingError(
            "no CUDA toolkit here, and the package index's takes none of the compilers here",
            evidence=", ".join(compiler.version for compiler in compilers),
            hint=f"apt-get install g++-{newest['gcc']}",
        )
    return CudaChoice(
        toolkit=None,
        host=host,
        archs=archs,
        reasons=(
            f"CUDA {_shown(INDEX_RELEASE)} from the package index",
            f"host compiler {host.version}",
            f"architectures {', '.join(archs)}: {origin}",
        ),
    )


def _wanted(asked: Sequence[str], gpus: Sequence[Gpu]) -> tuple[list[str], str]:
    """What to compile for, and on whose word; ``portable`` stays a word until a toolkit is chosen."""
    able = {gpu.arch: gpu for gpu in gpus if gpu.capability}
    typed = [part.strip().lower() for item in asked for part in re.split(r"[,;\s]+", item) if part.strip()]
    if not typed or typed == ["native"]:
        if able:
            seen = ", ".join(sorted({str(gpu) for gpu in able.values()}))
            return [f"{arch}-real" for arch in sorted(able, key=int)], f"the visible GPUs: {seen}"
        if typed:
            raise MissingError(
                "--cuda-arch native, but no GPU is visible",
                hint="name the architectures (`--cuda-arch 86,89`), or leave it out for the portable set",
            )
        return ["portable"], "no GPU visible, so the portable set (docs/building.md)"
    if typed in (["portable"], ["all"]):
        return ["portable"], "the portable set (docs/building.md)"
    return [_parse(item) for item in typed], "asked for"


def _parse(typed: str) -> str:
    """``8.6``, ``sm_86``, ``compute_90``, ``90a-real`` as cmake writes them."""
    found = re.fullmatch(r"(sm_|compute_)?(\d{1,2})\.?(\d)([af]?)(-real|-virtual)?", typed)
    if found:
        prefix, major, minor, suffix, kind = found.groups()
        if major + minor in ARCHITECTURES:
            own = {"sm_": "-real", "compute_": "-virtual"}.get(prefix or "", "")
            return f"{major}{minor}{suffix}{kind or own}"
    raise UsageError(
        f"--cuda-arch {typed}: not a CUDA architecture",
        hint=f"write numbers such as 86 or 8.6, `native` or `portable`; known: {', '.join(ARCHITECTURES)}",
    )


def _known(wanted: Iterable[str], known: frozenset[str], release: Release) -> tuple[str, ...]:
    """``wanted`` with the portable set filled in; MissingError for what this nvcc does not compile for."""
    archs: list[str] = []
    for item in wanted:
        if item == "portable":
            archs += [arch for arch in PORTABLE_ARCHITECTURES if arch.partition("-")[0] in known]
            continue
        number = re.sub(r"\D.*", "", item)
        if number not in known:
            raise MissingError(
                f"nvcc {_shown(release)} does not compile for sm_{number}; {releases_for(number)} does",
                hint=f"Install {releases_for(number)}.",
            )
        archs.append(item)
    return tuple(dict.fromkeys(archs))


def _require_driver(release: Release, archs: Sequence[str], machine: Machine) -> None:
    driver = machine.driver
    if driver is None or not machine.gpus:
        return
    if release[0] > driver.cuda[0]:
        least = DRIVER_MINIMUM.get(release[0], "a newer one")
        raise MissingError(
            f"its programs need driver {least} or newer; driver {driver.version} runs CUDA up to {_shown(driver.cuda)}",
            hint=f"Install driver {least}, or a CUDA {driver.cuda[0]} toolkit.",
        )
    if release > driver.cuda and all(arch.endswith("-virtual") for arch in archs):
        raise MissingError(
            f"driver {driver.version} (CUDA {_shown(driver.cuda)}) does not take PTX of CUDA {_shown(release)}",
            hint="Ask for machine code: --cuda-arch native.",
        )
    if release < MINIMUM_RELEASE:
        raise MissingError(f"llama.cpp's kernels need CUDA {_shown(MINIMUM_RELEASE)} or newer", hint="Install one.")


def _host(toolkit: Toolkit, compilers: Sequence[Compiler]) -> tuple[Compiler, str]:
    """The first compiler that nvcc takes: the usual one if it can be, else the newest installed that fits."""
    limit = {"gcc": toolkit.gcc_max, "clang": toolkit.clang_max}
    usual, *others = compilers
    if usual.major <= limit[usual.family]:
        return usual, f"host compiler {usual.version}"
    passed = f"{usual.family} {usual.major} is newer than CUDA {_shown(toolkit.release)} takes"
    for other in sorted(others, key=lambda compiler: (compiler.family == usual.family, compiler.major), reverse=True):
        if other.major <= limit[other.family]:
            return other, f"host compiler {other.path.name}: {passed} ({other.family} up to {limit[other.family]})"
    newer = f", or {releases_for_gcc(usual.major)}" if usual.family == "gcc" and releases_for_gcc(usual.major) else ""
    raise MissingError(
        f"{passed} ({usual.family} up to {limit[usual.family]}), and no other is installed",
        hint=f"Install g++-{toolkit.gcc_max} (`apt-get install g++-{toolkit.gcc_max}`){newer}.",
    )


def _require_served(archs: Sequence[str], gpus: Sequence[Gpu]) -> None:
    """Every visible GPU gets machine code or PTX that it can run: a GPU that is left out falls back to the CPU."""
    for gpu in gpus:
        if gpu.capability and serves(_device_code(archs), gpu.capability) is None:
            raise ArtifactError(
                f"a build for {', '.join(archs)} could not run on the visible {gpu}",
                hint=f"add {gpu.arch} to --cuda-arch, or set CUDA_VISIBLE_DEVICES= to build for other machines",
            )


def _device_code(archs: Sequence[str]) -> tuple[DeviceCode, ...]:
    """What nvcc makes of ``archs``: machine code (real), PTX (virtual), or both."""
    kinds: Mapping[str, tuple[Kind, ...]] = {"": ("sass", "ptx"), "real": ("sass",), "virtual": ("ptx",)}
    codes = {
        DeviceCode(arch=name, kind=kind)
        for name, _, how in (arch.partition("-") for arch in archs)
        for kind in kinds[how]
    }
    return tuple(sorted(codes))


def _shown(release: Release) -> str:
    return f"{release[0]}.{release[1]}"
