"""Source and options to a Toolchain: configured, compiled once, packaged, proven, then made current."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, console, files
from toolchain.base.errors import CommandError
from toolchain.base.machine import Compiler, Machine, find_compiler, probe
from toolchain.build import bindings, cmake, toolchain
from toolchain.build.options import BuildOptions, choose_options
from toolchain.build.pin import DEFAULT_PIN, SourceTree, parse_pin
from toolchain.build.solve import DISK_BYTES, Jobs, choose_jobs
from toolchain.build.source import fetch_source
from toolchain.build.toolchain import Toolchain

# What cmake and the compilers read from the environment.
FLAGS = re.compile(r"(C|CXX|CPP|LD|CUDA)FLAGS|CMAKE_\w+")
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the user asked for. ``defines`` are ``NAME=VALUE`` for cmake."""

    source: str = DEFAULT_PIN
    defines: tuple[str, ...] = ()
    jobs: int | None = None
    update: bool = False


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A request resolved on this machine: everything that the Toolchain's id stands for."""

    tree: SourceTree
    options: BuildOptions
    c: Compiler
    cxx: Compiler
    jobs: Jobs
    id: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """A Toolchain, whether it was there already, and the seconds that this call took."""

    toolchain: Toolchain
    reused: bool
    seconds: float


def build(request: BuildRequest) -> Built:
    """The Toolchain of ``request``: reused when it is there, else built.

    Raises FetchError, MissingError (compiler, disk), CommandError (compile) or ArtifactError (the proof),
    and leaves no folder that looks like a Toolchain. An interrupted compile goes on where it stopped.
    """
    started = time.monotonic()
    configuration = configure(request)
    if found := toolchain.load(configuration.id):
        return Built(toolchain=found, reused=True, seconds=time.monotonic() - started)
    lock = files.home_dir("toolchains") / f".{configuration.id}.lock"
    with files.locked(lock, lambda pid: console.say(f"waiting for process {pid}, which builds the same")):
        found = toolchain.load(configuration.id)
        made = found or _compile(configuration)
    return Built(toolchain=made, reused=found is not None, seconds=time.monotonic() - started)


def configure(request: BuildRequest) -> Configuration:
    """Fetch the source and settle options, compilers, jobs and the id. Starts no process when all is known."""
    machine = probe()
    c, cxx = find_compiler("c"), find_compiler("c++")
    jobs = choose_jobs(machine, request.jobs)
    tree = _fetch(request)
    options = choose_options(tree, request.defines)
    return Configuration(
        tree=tree, options=options, c=c, cxx=cxx, jobs=jobs, id=toolchain_id(tree, options, (c, cxx), machine)
    )


def toolchain_id(tree: SourceTree, options: BuildOptions, compilers: tuple[Compiler, ...], machine: Machine) -> str:
    """``COMMIT-DIGEST`` over source, bindings, options, compilers, their flags and, for native code, the CPU."""
    identity = {
        "source": tree.digest,
        "bindings": [bindings.LAYOUT, None if tree.bindings else DEFAULT_PIN],
        "options": options.defines,
        "environment": {name: value for name, value in sorted(os.environ.items()) if FLAGS.fullmatch(name)},
        "compilers": [compiler.version for compiler in compilers],
        "system": [machine.system, machine.arch],
        "cpu": sorted(machine.cpu_flags) if options.native else None,
    }
    return f"{tree.short_commit}-{files.digest(identity)[:12]}"


def _fetch(request: BuildRequest) -> SourceTree:
    pin = parse_pin(request.source)
    with console.step(f"fetch {pin}", quiet_s=0.5) as step:
        return fetch_source(pin, update=request.update, on_progress=step.advance)


def _compile(configuration: Configuration) -> Toolchain:
    started = time.monotonic()
    root = files.home_dir("toolchains") / configuration.id
    build_dir = files.home_dir("work") / f"build-{configuration.id}"
    log = files.home_dir("logs") / f"build-{configuration.id}.log"
    files.require_free(root, DISK_BYTES, "compiling llama.cpp")
    tree, program = configuration.tree, cmake.find_tool("cmake")
    with files.disk_errors(root), files.staged(root) as partial:
        with console.step("configure llama.cpp"):
            _configure(configuration, program, build_dir, log)
        with console.step("compile llama.cpp") as step:
            step.note = f"{configuration.jobs.count} jobs ({configuration.jobs.reason})"
            command.run(
                cmake.build_argv(cmake=program, build=build_dir, jobs=configuration.jobs.count),
                what="compiling llama.cpp",
                log=log,
                parse=command.parse_counter,
                on_progress=step.advance,
                hint=f"read the first error in {log}; with `--jobs 1` errors come in order",
            )
        with console.step("package the Python bindings"):
            command.run(
                cmake.install_argv(cmake=program, build=build_dir, prefix=partial),
                what="installing llama.cpp",
                log=log,
            )
            _copy_converter(tree.llama, partial / "convert")
            wheel = bindings.package(
                tree, lib_dir=partial / "lib", toolchain_id=configuration.id, out=partial / "wheel"
            )
        with console.step("prove the bindings") as step:
            proof = bindings.prove_wheel(wheel, commit=tree.short_commit)
            step.note = f"{', '.join(proof.backends)}; a decode agrees with its reference"
        made = Toolchain(
            id=configuration.id,
            root=root,
            commit=tree.commit,
            backends=proof.backends,
            wheel_name=wheel.name,
            wheel_version=proof.version,
            source=tree.pin,
            options=configuration.options.argv(),
            compilers=(configuration.c.version, configuration.cxx.version),
            seconds=round(time.monotonic() - started, 1),
        )
        shutil.copyfile(log, partial / "build.log")
        toolchain.save(made, partial)
    files.remove(build_dir, within=build_dir.parent)
    return made


def _configure(configuration: Configuration, program: Path, build_dir: Path, log: Path) -> None:
    """Run cmake. A failed configuration is thrown away, a finished one lets ninja go on where it stopped."""
    argv = cmake.configure_argv(
        cmake=program,
        ninja=cmake.find_tool("ninja"),
        source=configuration.tree.llama,
        build=build_dir,
        options=configuration.options,
        c=configuration.c,
        cxx=configuration.cxx,
    )
    log.unlink(missing_ok=True)
    try:
        command.run(argv, what="configuring llama.cpp", log=log, hint=f"the whole output is in {log}")
    except CommandError:
        files.remove(build_dir, within=build_dir.parent)
        raise


def _copy_converter(llama: Path, into: Path) -> None:
    into.mkdir()
    for name in CONVERTER_PARTS:
        part = llama / name
        if part.is_dir():
            shutil.copytree(part, into / name, ignore=shutil.ignore_patterns("__pycache__", "tests", "examples"))
        elif part.is_file():
            shutil.copy2(part, into / name)
