"""`inv build --prebuilt`: a wheel that somebody else built, chosen for this machine, fetched, proven and installed."""

from __future__ import annotations

import re
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from packaging.specifiers import SpecifierSet
from packaging.tags import sys_tags

from toolchain.base import console, files
from toolchain.base.abi import Layout, compare
from toolchain.base.abi_verdict import LAYOUT_FILE
from toolchain.base.errors import ArtifactError, FoundryError, MissingError, UsageError
from toolchain.base.machine import Machine, find_compiler, probe
from toolchain.build import abi, bindings, gpu_proof, proof
from toolchain.build.pin import DEFAULT_PIN, parse_pin
from toolchain.build.prebuilt import fetch_wheel
from toolchain.build.wheel_fit import Target, Verdict, judge, rejections
from toolchain.build.wheel_index import DEFAULT_INDEX, find_offers
from toolchain.build.wheel_offer import Flavour

MOST_TRIED = 3
"""Wheels that are fetched before giving up: those that fit by name and then fail their proof."""
SHOWN_REASONS = 12


@dataclass(frozen=True, kw_only=True)
class PrebuiltRequest:
    """What was asked: ``index`` a URL or folder, ``source`` an sdist pin whose version is wanted, ``want`` a flavour,
    ``sha256`` the hash that the wheel must have.
    """

    index: str = DEFAULT_INDEX
    source: str = DEFAULT_PIN
    want: Flavour | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The wheel that is installed now, what its proof found, and why the others were not taken."""

    wheel: Path
    proof: proof.Proof
    architectures: tuple[str, ...]
    executed: dict[str, object] | None
    reason: str
    abi: str
    rejected: tuple[str, ...]
    seconds: float


def parse_request(
    *,
    index: str | None,
    source: str | None,
    variants: Sequence[str],
    sha256: str | None,
    only_for_builds: Sequence[str],
) -> PrebuiltRequest:
    """The request from what was typed; UsageError for what cannot be asked of a prebuilt wheel, as are the options
    ``only_for_builds`` that were typed.
    """
    if only_for_builds:
        raise UsageError(
            f"--prebuilt compiles nothing: {', '.join(only_for_builds)} cannot be honoured",
            hint="leave these out, or --prebuilt; with --or-build those of the build are kept for it",
        )
    pin = parse_pin(source or DEFAULT_PIN)
    if pin.kind != "sdist":
        raise UsageError(
            f"--prebuilt takes published versions, not {pin}",
            hint="write --source sdist:llama-cpp-python==VERSION, or leave --prebuilt out to build it",
        )
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256.lower()):
        raise UsageError(f"--sha256 {sha256} is no SHA-256", hint="64 hexadecimal digits, as `sha256sum WHEEL` prints")
    flavours = [name for name in variants if name in get_args(Flavour)]
    if others := [name for name in variants if name not in flavours]:
        raise UsageError(
            f"--prebuilt cannot choose {', '.join(others)}",
            hint="it chooses among cpu, cuda and vulkan wheels; leave --prebuilt out to build the rest",
        )
    want: Flavour | None = next((flavour for flavour in get_args(Flavour) if flavour in flavours), None)
    return PrebuiltRequest(
        index=index or DEFAULT_INDEX, source=str(pin), want=want, sha256=sha256.lower() if sha256 else None
    )


def choose_wheels(request: PrebuiltRequest, machine: Machine) -> tuple[list[Verdict], list[str]]:
    """The wheels that fit this machine, best first, and why the others do not; MissingError when none fits."""
    with console.step(f"look for a wheel in {request.index}") as step:
        verdicts = judge(find_offers(request.index), target(machine, request))
        fitting = [verdict for verdict in verdicts if verdict.rejected is None]
        step.note = f"{len(fitting)} of {len(verdicts)} fit"
    reasons = _shown(verdicts)
    if not fitting:
        raise MissingError(
            "no prebuilt wheel fits this machine",
            evidence="\n".join(reasons) or f"{request.index} has no wheel of llama-cpp-python",
            hint="`./inv build` compiles one (`--or-build` does so whenever none fits), or name another --index",
        )
    return fitting, reasons


def install_prebuilt(request: PrebuiltRequest) -> Installed:
    """Install the best wheel that fits this machine and holds its proof.

    Raises MissingError when none fits, with the reasons and how many wheels each cost; FetchError when the index or
    a wheel cannot be had; ArtifactError when those that fit fail their proof.
    """
    started = time.monotonic()
    machine = probe()
    fitting, reasons = choose_wheels(request, machine)
    for line in reasons:
        console.say(f"  {line}")
    failed: list[FoundryError] = []
    for verdict in fitting[:MOST_TRIED]:
        try:
            return _install(verdict, request, machine, reasons, started)
        except ArtifactError as error:
            failed.append(error)
            console.warn(f"{verdict.offer.filename}: {error.message}")
    raise failed[0]


def target(machine: Machine, request: PrebuiltRequest) -> Target:
    """This machine and this Python, as wheels are judged by them."""
    return Target(
        tags=tuple(sys_tags()),
        cpu_flags=machine.cpu_flags,
        driver_cuda=machine.driver.cuda if machine.driver else None,
        capabilities=tuple(gpu.capability for gpu in machine.gpus if gpu.capability),
        version=SpecifierSet(f"=={parse_pin(request.source).ref}"),
        want=request.want,
    )


def _install(
    verdict: Verdict, request: PrebuiltRequest, machine: Machine, reasons: Sequence[str], started: float
) -> Installed:
    offer = verdict.offer
    if verdict.note:
        console.warn(f"{offer.filename}: {verdict.note}")
    with console.step(f"fetch {offer.filename}", quiet_s=0.2) as step:
        wheel = fetch_wheel(offer, sha256=request.sha256, on_progress=step.advance)
    with (
        console.step("prove the wheel") as step,
        tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="prebuilt-") as scratch,
    ):
        unpacked = Path(scratch)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        codes = gpu_proof.embedded(unpacked)
        gpu_proof.require_served(codes, machine.gpus)
        agreed = check_structs(unpacked)
        found = proof.prove(commit=None, path=unpacked)
        promised = {"cuda": "CUDA", "vulkan": "Vulkan", "metal": "Metal"}.get(request.want or offer.flavour)
        proof.require_backends(
            found, {f"{request.want or offer.flavour} by {offer.filename}": promised} if promised else {}
        )
        executed, reason = gpu_proof.judge_execution(found, codes, machine.gpus)
        step.note = f"{', '.join(found.backends)}; {reason}; {agreed}"
    bindings.ensure_installed(wheel, version=found.version, commit=None, prebuilt=True)
    return Installed(
        wheel=wheel,
        proof=found,
        architectures=gpu_proof.architecture_names(codes),
        executed=executed,
        reason=reason,
        abi=agreed,
        rejected=tuple(reasons),
        seconds=time.monotonic() - started,
    )


def check_structs(root: Path, *, installed: bool = False) -> str:
    """What can be said of the structs of the package below ``root`` (else ``installed`` there): from the wheel's own
    record, else from headers that it carries. ArtifactError when bindings and library disagree.
    """
    declared = abi.declared_by(None if installed else root)
    noted = files.read_json(root / "llama_cpp" / LAYOUT_FILE)
    headers = sorted((root / "llama_cpp").rglob("llama.h")) + sorted((root / "include").glob("llama.h"))
    if isinstance(noted, dict):
        layout = Layout.from_json(noted)
    elif headers:
        layout = abi.compiled_layout(declared, include_dirs=[headers[0].parent], compiler=find_compiler("c"))
    else:
        return "its structs are unproven: the wheel carries no headers"
    if faults := compare(declared, layout):
        raise ArtifactError(
            "its Python bindings disagree with its library",
            evidence="\n".join(faults),
            hint="build it instead (`./inv build`), which mends what is known, or take another version",
        )
    return "its structs agree"


def _shown(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [f"{count} wheel{'s' * (count > 1)}: {reason}" for reason, count in rejections(verdicts)]
    return lines[:SHOWN_REASONS] + ([f"and {len(lines) - SHOWN_REASONS} reasons more"] if lines[SHOWN_REASONS:] else [])
