"""The CUDA solver: driver x toolkit x host compiler x architectures, settled and explained before cmake runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.base.errors import ArtifactError, FoundryError, MissingError, UsageError
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
    shown,
)
from toolchain.build.fatbin import DeviceCode, Kind, serves
from toolchain.build.toolkit import NAMED, Toolkit

INDEX_RELEASE: Release = (13, 0)
"""The release that is taken from the package index where the machine has no toolkit: the one we are tested with."""


@dataclass(frozen=True, kw_only=True)
class CudaChoice:
    """What the solver settled. ``toolkit`` None: take INDEX_RELEASE from the package index.

    ``archs`` are written as cmake wants them (``89-real``, ``90``, ``75-virtual``); ``vmm``: whether the code may be
    linked with the driver, which ggml's pool of virtual memory needs; ``reasons`` say, one line each, why it is so and
    what was passed over.
    """

    toolkit: Toolkit | None
    host: Compiler
    archs: tuple[str, ...]
    reasons: tuple[str, ...]
    vmm: bool = False

    @property
    def wanted(self) -> tuple[DeviceCode, ...]:
        """What the library must carry."""
        return _device_code(self.archs)


def choose_cuda(
    *, toolkits: Sequence[Toolkit], compilers: Sequence[Compiler], machine: Machine, asked: Sequence[str] = ()
) -> CudaChoice:
    """The newest toolkit that driver, GPUs and a host compiler allow; one that the user named, or none but it.

    ``asked`` are architectures as typed (75, 8.6, sm_90, 90-virtual, native, portable); empty: the visible GPUs',
    and without any the portable set. A toolkit that compiles for all visible GPUs comes before a newer one that
    leaves some out. Raises MissingError with each toolkit's reason and what to install, UsageError for what is no
    architecture, ArtifactError when no visible GPU could be served.
    """
    _require_linux(machine)
    named = [toolkit for toolkit in toolkits if toolkit.found_by in NAMED][:1]
    candidates = named or sorted(toolkits, key=lambda toolkit: toolkit.release, reverse=True)
    if not candidates:
        return from_index(compilers=compilers, machine=machine, asked=asked)
    passed_over: list[str] = []
    hints: list[str] = []
    unserved: ArtifactError | None = None
    for may_leave_out in (False, True):
        for toolkit in candidates:
            try:
                choice = _choose(toolkit, compilers, machine, asked, may_leave_out)
            except (MissingError, ArtifactError) as unfit:
                unserved = unfit if isinstance(unfit, ArtifactError) else unserved
                if not may_leave_out:
                    passed_over.append(f"{toolkit}: {unfit.message}")
                    hints.append(unfit.hint)
                continue
            return replace(choice, reasons=(*choice.reasons, *passed_over))
    if unserved:
        raise unserved
    raise MissingError(
        "no CUDA toolkit on this machine fits",
        evidence="\n".join(passed_over),
        hint=" ".join(dict.fromkeys(filter(None, hints))) + _index_hint(compilers, machine, asked),
    )


def from_index(*, compilers: Sequence[Compiler], machine: Machine, asked: Sequence[str] = ()) -> CudaChoice:
    """The same with the package index's toolkit; its limits are known before it is fetched."""
    _require_linux(machine)
    described = Toolkit(
        root=Path(),
        version=f"{shown(INDEX_RELEASE)}.0",
        found_by="the package index",
        archs=known_architectures(INDEX_RELEASE),
        gcc_max=newest_compiler(INDEX_RELEASE, "gcc"),
        clang_max=newest_compiler(INDEX_RELEASE, "clang"),
        driver_stub=False,
    )
    choice = _choose(described, compilers, machine, asked, may_leave_out=True)
    return replace(choice, toolkit=None)


def _choose(
    toolkit: Toolkit, compilers: Sequence[Compiler], machine: Machine, asked: Sequence[str], may_leave_out: bool
) -> CudaChoice:
    """What ``toolkit`` makes possible; MissingError with the reason when it does not fit."""
    if toolkit.release < MINIMUM_RELEASE:
        raise MissingError(
            f"llama.cpp's kernels need CUDA {shown(MINIMUM_RELEASE)} or newer", hint="Install a newer toolkit."
        )
    able = [gpu for gpu in machine.gpus if gpu.capability]
    known = [gpu for gpu in able if gpu.arch in toolkit.archs]
    wanted, origin = _wanted(asked, known if may_leave_out and known else able)
    archs = _known(wanted, toolkit)
    jit = _require_driver(toolkit.release, machine)
    host, host_reason = _host(toolkit, compilers)
    unserved = _unserved(archs, able, jit=jit)
    if able and len(unserved) == len(able):
        raise ArtifactError(
            f"a build for {', '.join(archs)} could not run on the visible {able[0]}",
            evidence="" if jit else f"the driver here does not take PTX of CUDA {shown(toolkit.release)}",
            hint=f"add {able[0].arch} to --cuda-arch, or set CUDA_VISIBLE_DEVICES= to build for other machines",
        )
    reasons = [str(toolkit), host_reason, f"architectures {', '.join(archs)}: {origin}"]
    if not toolkit.cublas:
        reasons.append("cuBLAS, which it lacks, comes from the package index")
    reasons += [f"{gpu} is left out: no code in this build runs on it" for gpu in unserved]
    # what is linked with the driver starts on no machine without one: not for this one's proof either
    vmm = toolkit.driver_stub and machine.driver is not None
    return CudaChoice(toolkit=toolkit, host=host, archs=archs, reasons=tuple(reasons), vmm=vmm)


def _index_hint(compilers: Sequence[Compiler], machine: Machine, asked: Sequence[str]) -> str:
    try:
        from_index(compilers=compilers, machine=machine, asked=asked)
    except FoundryError:
        return ""
    return " Or `--cuda-toolkit index` takes one from the package index."


def _require_linux(machine: Machine) -> None:
    if machine.system != "Linux":
        raise MissingError(
            f"there is no CUDA for {machine.system}",
            hint="leave --cuda out: on a Mac llama.cpp uses the GPU through Metal by itself",
        )


def _wanted(asked: Sequence[str], gpus: Sequence[Gpu]) -> tuple[list[str], str]:
    """What to compile for, and on whose word; ``portable`` stays a word until a toolkit is chosen."""
    able = {gpu.arch: gpu for gpu in gpus if gpu.capability}
    native = [f"{arch}-real" for arch in sorted(able, key=int)]
    typed = [part.strip().lower() for item in asked for part in re.split(r"[,;\s]+", item) if part.strip()]
    if "native" in typed and not able:
        raise MissingError(
            "--cuda-arch native, but no GPU is visible",
            hint="name the architectures (`--cuda-arch 86,89`), or leave it out for the portable set",
        )
    if typed in ([], ["native"]) and able:
        return native, f"the visible GPUs: {', '.join(sorted({str(gpu) for gpu in able.values()}))}"
    if not typed:
        return ["portable"], "no GPU visible, so the portable set (docs/building.md)"
    if typed in (["portable"], ["all"]):
        return ["portable"], "the portable set (docs/building.md)"
    parts = [native if item == "native" else [item] if item == "portable" else [_parse(item)] for item in typed]
    return [arch for part in parts for arch in part], "asked for"


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


def _known(wanted: Iterable[str], toolkit: Toolkit) -> tuple[str, ...]:
    """``wanted`` with the portable set filled in; MissingError for what this nvcc does not compile for."""
    archs: list[str] = []
    for item in wanted:
        if item == "portable":
            archs += [arch for arch in PORTABLE_ARCHITECTURES if arch.partition("-")[0] in toolkit.archs]
            continue
        number = re.sub(r"\D.*", "", item)
        if number not in toolkit.archs:
            raise MissingError(
                f"nvcc {shown(toolkit.release)} does not compile for sm_{number}; {releases_for(number)} does",
                hint=f"Install {releases_for(number)}.",
            )
        archs.append(item)
    return tuple(dict.fromkeys(archs))


def _require_driver(release: Release, machine: Machine) -> bool:
    """Whether the driver here takes PTX of ``release``; MissingError when it runs nothing of it."""
    driver = machine.driver
    if driver is None or not machine.gpus:
        return True
    if release[0] > driver.cuda[0]:
        least = DRIVER_MINIMUM.get(release[0], "a newer one")
        raise MissingError(
            f"its programs need driver {least} or newer; driver {driver.version} runs CUDA up to {shown(driver.cuda)}",
            hint=f"Install driver {least}, or a CUDA {driver.cuda[0]} toolkit.",
        )
    return release <= driver.cuda


def _host(toolkit: Toolkit, compilers: Sequence[Compiler]) -> tuple[Compiler, str]:
    """The first compiler that nvcc takes: the usual one if it can be, else the newest installed that fits."""
    limit = {"gcc": toolkit.gcc_max, "clang": toolkit.clang_max}
    usual, *others = compilers
    if usual.major <= limit[usual.family]:
        return usual, f"host compiler {usual.version}"
    passed = f"{usual.family} {usual.major} is newer than CUDA {shown(toolkit.release)} takes"
    for other in sorted(others, key=lambda compiler: (compiler.family == usual.family, compiler.major), reverse=True):
        if other.major <= limit[other.family]:
            return other, f"host compiler {other.path.name}: {passed} ({other.family} up to {limit[other.family]})"
    newer = f", or {releases_for_gcc(usual.major)}" if usual.family == "gcc" and releases_for_gcc(usual.major) else ""
    raise MissingError(
        f"{passed} ({usual.family} up to {limit[usual.family]}), and no other is installed",
        hint=f"Install g++-{toolkit.gcc_max} (`apt-get install g++-{toolkit.gcc_max}`){newer}.",
    )


def _unserved(archs: Sequence[str], gpus: Sequence[Gpu], *, jit: bool) -> list[Gpu]:
    """The GPUs that get neither machine code nor, where the driver compiles it (``jit``), PTX that they can run."""
    codes = [code for code in _device_code(archs) if jit or code.kind == "sass"]
    return [gpu for gpu in gpus if gpu.capability and serves(codes, gpu.capability) is None]


def _device_code(archs: Sequence[str]) -> tuple[DeviceCode, ...]:
    """What nvcc makes of ``archs``: machine code (real), PTX (virtual), or both.

    llama.cpp compiles 12X as 12Xa, for the sake of FP4 instructions (ggml-cuda/CMakeLists.txt): it runs there alone.
    """
    kinds: Mapping[str, tuple[Kind, ...]] = {"": ("sass", "ptx"), "real": ("sass",), "virtual": ("ptx",)}
    codes = set()
    for name, _, how in (arch.partition("-") for arch in archs):
        own = re.sub(r"^(12\d)$", r"\1a", name)
        codes |= {DeviceCode(arch=own, kind=kind) for kind in kinds[how]}
    return tuple(sorted(codes))
