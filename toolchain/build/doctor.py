"""What is wrong here, and how is it mended? The proofs of a build, repeated for machine, Toolchain and environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from toolchain.base import command, files
from toolchain.base.console import format_bytes
from toolchain.base.errors import ArtifactError, FoundryError, MissingError
from toolchain.base.machine import Machine, find_compiler, probe
from toolchain.build import bindings, gpu_proof, legacy, proof, toolchain
from toolchain.build.abi import prove_abi
from toolchain.build.fatbin import DeviceCode, serves
from toolchain.build.install_prebuilt import check_structs
from toolchain.build.toolchain import Toolchain
from toolchain.build.toolkit import find_toolkits

LOW_DISK_BYTES = 2 << 30
REDIRECTS = ("LLAMA_CPP_LIB_PATH", "LLAMA_CPP_LIB", "LD_PRELOAD")
SEARCH_PATHS = {"PYTHONPATH": "llama_cpp/__init__.py", "LD_LIBRARY_PATH": "lib*llama.so"}
"""Variables by which another library, or package, than the installed one may be loaded."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. ``note``: works, but not as one may think; ``bad``: does not work, with the
    exit code that such a failure has. ``mend`` is what to type or do.
    """

    subject: str
    state: Literal["ok", "note", "bad"]
    finding: str
    mend: str = ""
    exit_code: int = 0


def examine() -> tuple[Finding, ...]:
    """Everything, in the order in which one thing needs the other. Raises nothing: a failure is a finding."""
    machine = probe()
    current = toolchain.current()
    return (*_machine(machine), *_toolchain(current, machine), *_bindings(current, machine), *_trainer())


def _machine(machine: Machine) -> Iterator[Finding]:
    quota = f", {machine.quota:g} of them granted" if machine.quota is not None else ""
    yield _ok(
        "machine",
        f"{machine.cpu_model}: {machine.cpus} CPUs{quota}, {format_bytes(machine.available_bytes)} of "
        f"{format_bytes(machine.ram_bytes)} memory free",
    )
    for language in ("c", "c++"):
        yield from _tried("compiler", lambda language=language: find_compiler(language).version)  # type: ignore[misc]
    home = files.foundry_home()
    free = shutil.disk_usage(files.existing(home)).free
    low = free < LOW_DISK_BYTES
    yield Finding(
        subject="disk",
        state="note" if low else "ok",
        finding=f"{format_bytes(free)} free for {home}",
        mend="`./inv clean`, or set FOUNDRY_HOME to a larger disk" if low else "",
    )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    for gpu in machine.gpus:
        yield _ok("gpu", f"{gpu}, {format_bytes(gpu.memory_bytes)}")
    if machine.driver:
        yield _ok("driver", "{}, runs CUDA up to {}.{}".format(machine.driver.version, *machine.driver.cuda))
    elif machine.gpus:
        yield _bad(
            "driver",
            "the kernel shows the GPU, the driver's library does not answer",
            "run `nvidia-smi`; after a driver update, restart the machine; in a container, pass --gpus all",
            MissingError.exit_code,
        )
    if not machine.gpus:
        why = f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else ""
        yield _note("gpu", f"no NVIDIA GPU is visible{why}")
    yield from _tried("cuda", lambda: "; ".join(map(str, find_toolkits())) or "no CUDA toolkit installed")


def _toolchain(current: Toolchain | None, machine: Machine) -> Iterator[Finding]:
    if current is None:
        yield _note("toolchain", "none built yet", "./inv build")
        return
    yield _ok("toolchain", f"{current.id}: {current.source}, backends {', '.join(current.backends)}")
    yield from _tried("tools", lambda: _runs(current))
    codes: tuple[DeviceCode, ...] = ()
    try:
        codes = gpu_proof.embedded(current.root)
    except FoundryError as error:
        yield _from_error("cuda code", error)
    if codes and current.architectures and gpu_proof.architecture_names(codes) != current.architectures:
        there, built = ", ".join(gpu_proof.architecture_names(codes)), ", ".join(current.architectures)
        yield _bad("cuda code", f"the library carries {there}; it was built with {built}", "./inv build")
    elif codes:
        yield _ok("cuda code", ", ".join(gpu_proof.architecture_names(codes)))
        yield from (_served(codes, gpu.capability, str(gpu)) for gpu in machine.gpus if gpu.capability)
        if not machine.gpus:
            yield _note(
                "cuda code",
                "no GPU visible: this build falls back to the CPU here",
                "run it where there is a GPU, or `./inv build --cpu` for this machine",
            )
    elif machine.gpus and not set(current.backends) - {"CPU", "BLAS", "RPC"}:
        yield _note("cuda code", f"{machine.gpus[0]} is visible, and this build does not use it", "./inv build --cuda")


def _bindings(current: Toolchain | None, machine: Machine) -> Iterator[Finding]:
    version = bindings.installed_version()
    if version is None:
        yield _note("bindings", "llama_cpp is not installed in this environment", "./inv build")
        return
    yield from _redirects()
    prebuilt = bindings.prebuilt_version() is not None
    if prebuilt:
        yield _ok("bindings", f"llama_cpp {version}, a prebuilt wheel")
    elif current is None:
        yield _note("bindings", f"llama_cpp {version} is installed, and no toolchain is in use", "./inv build")
    elif version != current.wheel_version:
        told = f"llama_cpp {version} is installed, the current toolchain's is {current.wheel_version}"
        yield _bad("bindings", told, f"./inv use {current.id}")
    else:
        yield _ok("bindings", f"llama_cpp {version}")
    own = None if prebuilt else current
    yield from _tried("abi", lambda: _abi(own))
    yield from _tried("decode", lambda: _decodes(own, machine))


def _redirects() -> Iterator[Finding]:
    for name in REDIRECTS:
        if value := os.environ.get(name):
            yield _note("bindings", f"{name}={value} makes Python load another library", f"unset {name}")
    for name, pattern in SEARCH_PATHS.items():
        for folder in filter(None, os.environ.get(name, "").split(os.pathsep)):
            if any(Path(folder).glob(pattern)):
                yield _note("bindings", f"{name} leads to another llama.cpp in {folder}", f"take it out of {name}")


def _trainer() -> Iterator[Finding]:
    if found := toolchain.current("trainer"):
        yield from _tried("trainer", lambda: _trains(found))


def _runs(current: Toolchain) -> str:
    """The version that a program tells: llama-cli, which was ``main`` until mid-2024."""
    programs = [path for name in ("llama-cli", "main") if (path := current.bin_dir / name).exists()]
    if not programs:
        raise MissingError(f"{current.bin_dir} holds no program", hint="./inv clean --toolchain, then ./inv build")
    told = command.capture([programs[0], "--version"], what=f"running {programs[0].name}")
    return next((line for line in told.splitlines() if line.startswith("version")), told)


def _abi(current: Toolchain | None) -> str:
    package = importlib.util.find_spec("llama_cpp")
    if current is None or not (current.root / "include" / "ggml.h").is_file():
        assert package is not None
        assert package.submodule_search_locations
        return check_structs(Path(package.submodule_search_locations[0]).parent, installed=True)
    layout = prove_abi(path=None, include_dirs=[current.root / "include"], compiler=find_compiler("c"))
    return f"{len(layout.structs)} structs and {len(layout.constants)} constants agree with the library's headers"


def _decodes(current: Toolchain | None, machine: Machine) -> str:
    found = proof.prove(commit=current.short_commit if current else None)
    codes = gpu_proof.embedded(Path(found.library).parent)
    _, reason = gpu_proof.judge_execution(found, codes, machine.gpus)
    return f"a decode agrees with its reference; {reason}"


def _trains(found: Toolchain) -> str:
    if found.needs_driver and probe().driver is None:
        return f"{found.id}: needs an NVIDIA driver, and there is none here"
    losses = legacy.prove_trainer(found.bin_dir).losses
    return f"{found.id}: three steps, loss {' → '.join(f'{loss:.2f}' for loss in losses)}"


def _served(codes: tuple[DeviceCode, ...], capability: tuple[int, int], gpu: str) -> Finding:
    if how := serves(codes, capability):
        return _ok("cuda code", f"{gpu} runs {how}")
    arch = "{}{}".format(*capability)
    return _bad("cuda code", f"nothing in it runs on {gpu}", f"./inv build --cuda --cuda-arch {arch}")


def _tried(subject: str, look: Callable[[], str]) -> Iterator[Finding]:
    try:
        yield _ok(subject, look())
    except FoundryError as error:
        yield _from_error(subject, error)


def _from_error(subject: str, error: FoundryError) -> Finding:
    evidence = f": {error.evidence.splitlines()[0]}" if error.evidence else ""
    return _bad(subject, f"{error.message}{evidence}", error.hint, error.exit_code)


def _ok(subject: str, finding: str) -> Finding:
    return Finding(subject=subject, state="ok", finding=finding)


def _note(subject: str, finding: str, mend: str = "") -> Finding:
    return Finding(subject=subject, state="note", finding=finding, mend=mend)


def _bad(subject: str, finding: str, mend: str, exit_code: int = ArtifactError.exit_code) -> Finding:
    return Finding(subject=subject, state="bad", finding=finding, mend=mend, exit_code=exit_code)


def as_json(findings: tuple[Finding, ...]) -> dict[str, object]:
    """What ``inv doctor --json`` answers."""
    current = toolchain.current()
    return {
        "toolchain_id": current.id if current else None,
        "healthy": not any(finding.state == "bad" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
