"""A configuration to a Toolchain: configured, compiled once, packaged, proven, then made current."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.base import command, console, files
from toolchain.base.command import prepended
from toolchain.base.errors import CommandError
from toolchain.build import bindings, cmake, gpu_proof, legacy, proof, toolchain
from toolchain.build.configure import BuildRequest, Configuration, compilers_of, configure, with_toolkit
from toolchain.build.fatbin import DeviceCode
from toolchain.build.solve import disk_bytes
from toolchain.build.source import stage_source, writes_among_its_sources
from toolchain.build.toolchain import Toolchain
from toolchain.build.webui import Page, build_page, hand_over, prove_page

_SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "convert_llama_ggml_to_gguf.py")
CONVERTER_PARTS = (*_SCRIPTS, "conversion", "gguf-py")


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
    if found := _there(configuration):
        return Built(toolchain=found, reused=True, seconds=time.monotonic() - started)
    lock = files.home_dir("toolchains") / f".{configuration.id}.lock"
    with files.locked(lock, lambda pid: console.say(f"waiting for process {pid}, which builds the same")):
        found = _there(configuration)
        made = found or _compile(with_toolkit(configuration))
    return Built(toolchain=made, reused=found is not None, seconds=time.monotonic() - started)


def _there(configuration: Configuration) -> Toolchain | None:
    """The finished Toolchain, judged by the GPUs that are visible now: they may be others than while it was built."""
    found = toolchain.load(configuration.id)
    if found is None:
        return None
    if not found.whole:
        console.warn(f"{found.id} was linked with {found.toolkit_lib}, which is gone: building it again")
        return None
    gpus = [gpu for gpu in configuration.machine.gpus if gpu.capability]
    if found.kind != "llama" or configuration.cuda is None or not gpus:
        return found
    codes = gpu_proof.embedded(found.root)
    gpu_proof.require_served(codes, gpus)
    if found.executed is None:
        with console.step(f"prove the build on {gpus[0]}") as step:
            proven = proof.prove_wheel(found.wheel, commit=found.short_commit)
            executed, step.note = gpu_proof.judge_execution(proven, codes, gpus)
        found = replace(found, executed=executed, reason=step.note)
        toolchain.save(found, found.root)
    return found


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One build under way: what, from where, into which folder, told to which log."""

    configuration: Configuration
    source: Path
    build_dir: Path
    into: Path
    log: Path

    @property
    def page_log(self) -> Path:
        return self.log.with_name(f"page-{self.configuration.id}.log")

    def configure_and_compile(self, *, targets: tuple[str, ...] = (), page: Page | None = None) -> None:
        """cmake, then ninja. A failed configuration is thrown away, a finished one goes on where it stopped.

        ``page`` is laid where the tree's own scripts look for one that npm has built.
        """
        configuration, program = self.configuration, cmake.find_tool("cmake")
        argv = cmake.configure_argv(
            cmake=program,
            ninja=cmake.find_tool("ninja"),
            source=self.source,
            build=self.build_dir,
            options=configuration.options,
            c=configuration.c,
            cxx=configuration.cxx,
        )
        self.log.unlink(missing_ok=True)
        try:
            with console.step("configure llama.cpp"):
                command.run(argv, what="configuring llama.cpp", log=self.log, hint=f"the whole output is in {self.log}")
        except CommandError:
            files.remove(self.build_dir, within=self.build_dir.parent)
            raise
        if page:
            hand_over(page, llama=self.source, build=self.build_dir)
        with console.step("compile llama.cpp") as step:
            step.note = f"{configuration.jobs.count} jobs ({configuration.jobs.reason})"
            command.run(
                cmake.build_argv(cmake=program, build=self.build_dir, jobs=configuration.jobs.count, targets=targets),
                what="compiling llama.cpp",
                log=self.log,
                parse=command.parse_counter,
                on_progress=step.advance,
                hint=f"read the first error in {self.log}; with `--jobs 1` errors come in order",
            )


def _compile(configuration: Configuration) -> Toolchain:
    started = time.monotonic()
    root = files.home_dir("toolchains") / configuration.id
    build_dir = files.home_dir("work") / f"build-{configuration.id}"
    log = files.home_dir("logs") / f"build-{configuration.id}.log"
    files.require_free(root, disk_bytes(configuration.cuda), "compiling llama.cpp")
    for line in (*configuration.options.notes, *(configuration.cuda.reasons if configuration.cuda else ())):
        console.say(f"  {line}")
    with files.disk_errors(root), files.staged(root) as partial:
        partial.mkdir()
        source = configuration.tree.llama
        if writes_among_its_sources(source):
            source = stage_source(configuration.tree, build_dir.with_name(build_dir.name + "-source"))
        job = _Job(configuration=configuration, source=source, build_dir=build_dir, into=partial, log=log)
        made = _make_trainer(job) if configuration.legacy else _make_llama(job)
        made = replace(made, root=root, seconds=round(time.monotonic() - started, 1))
        shutil.copyfile(log, partial / "build.log")
        toolchain.save(made, partial)
    for used in (build_dir, build_dir.with_name(build_dir.name + "-source")):
        files.remove(used, within=build_dir.parent)
    return made


def _make_llama(job: _Job) -> Toolchain:
    """Tools, libraries, converter and wheel; proven together."""
    configuration, tree = job.configuration, job.configuration.tree
    page = None
    if configuration.options.builds_page:
        with console.step("build the web page") as step:
            page = build_page(tree.llama, log=job.page_log, on_progress=step.advance)
    job.configure_and_compile(page=page)
    command.run(
        cmake.install_argv(cmake=cmake.find_tool("cmake"), build=job.build_dir, prefix=job.into),
        what="installing llama.cpp",
        log=job.log,
    )
    codes = _cuda_code(job)
    if page:
        with console.step("prove the web page"):
            prove_page(job.into / "bin" / "llama-server", page, log=job.page_log)
    with console.step("package the Python bindings"):
        _copy_converter(tree.llama, job.into / "convert")
        wheel = bindings.package(
            tree,
            root=job.into,
            compiler=configuration.c,
            local=bindings.local_version(
                configuration.id, job.into / "lib", configuration.variants, configuration.cuda
            ),
            out=job.into / "wheel",
            loads_backends=configuration.options.loads_backends,
            choice=configuration.cuda,
            env=_without_driver(configuration),
        )
    with console.step("prove the build") as step:
        proven = proof.prove_wheel(wheel, commit=tree.short_commit, env=_without_driver(configuration))
        proof.require_backends(proven, {v.flag: v.backend for v in configuration.variants if v.backend})
        executed, reason = gpu_proof.judge_execution(proven, codes, configuration.machine.gpus)
        step.note = f"{', '.join(proven.backends)}; a decode agrees with its reference; {reason}"
    return replace(
        _plain(configuration),
        backends=proven.backends,
        architectures=gpu_proof.architecture_names(codes),
        executed=executed,
        reason=reason,
        wheel_name=wheel.name,
        wheel_version=proven.version,
    )


def _make_trainer(job: _Job) -> Toolchain:
    """The four programs of 2023; proven by three training steps."""
    configuration = job.configuration
    job.configure_and_compile(targets=legacy.TRAINER_PROGRAMS)
    legacy.install_programs(job.build_dir, job.into)
    codes = _cuda_code(job)
    gpus = [gpu for gpu in configuration.machine.gpus if gpu.capability]
    gpu_proof.require_served(codes, gpus)
    with console.step("prove the trainer") as step:
        found = legacy.prove_trainer(job.into / "bin", env=_without_driver(configuration), on_gpu=bool(codes and gpus))
        told = " → ".join(f"{loss:.2f}" for loss in found.losses)
        step.note = (
            f"three steps: loss {told}; merged: perplexity {found.perplexity_base:.0f} → {found.perplexity_merged:.0f}"
        )
    return replace(
        _plain(configuration),
        backends=("CUDA", "CPU") if codes else ("CPU",),
        architectures=gpu_proof.architecture_names(codes),
        reason=step.note,
    )


def _cuda_code(job: _Job) -> tuple[DeviceCode, ...]:
    """The device code that was built, proven to be what was asked for; empty without CUDA."""
    if job.configuration.cuda is None:
        return ()
    with console.step("list the CUDA code") as step:
        codes = gpu_proof.prove_cuda(job.into, job.configuration.cuda)
        step.note = ", ".join(gpu_proof.architecture_names(codes))
    return codes


def _plain(configuration: Configuration) -> Toolchain:
    """What is known of a Toolchain before it is made."""
    return Toolchain(
        id=configuration.id,
        root=Path(),
        kind="trainer" if configuration.legacy else "llama",
        commit=configuration.tree.commit,
        backends=(),
        wheel_name="",
        wheel_version="",
        source=configuration.tree.pin,
        options=configuration.options.argv(),
        compilers=compilers_of(configuration.c, configuration.cxx, configuration.cuda),
        seconds=0.0,
        variants=tuple(variant.name for variant in configuration.variants),
        toolkit_lib=str(configuration.toolkit.lib_dir) if configuration.toolkit else "",
        needs_driver=configuration.cuda is not None and not configuration.options.is_on("GGML_CUDA_NO_VMM"),
    )


def _without_driver(configuration: Configuration) -> dict[str, str | None]:
    """What lets programs that are linked with the driver start for their proof where there is none."""
    if configuration.driver_stub is None or configuration.machine.driver is not None:
        return {}
    return {"LD_LIBRARY_PATH": prepended("LD_LIBRARY_PATH", configuration.driver_stub / "run")}


def _copy_converter(llama: Path, into: Path) -> None:
    into.mkdir()
    for name in CONVERTER_PARTS:
        part = llama / name
        if part.is_dir():
            shutil.copytree(part, into / name, ignore=shutil.ignore_patterns("__pycache__", "tests", "examples"))
        elif part.is_file():
            shutil.copy2(part, into / name)
