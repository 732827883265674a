"""What was asked, resolved on this machine: source, options, compilers, CUDA, jobs and the Toolchain's id."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.base import console, files
from toolchain.base.machine import Compiler, Machine, find_compiler, host_compilers, probe
from toolchain.build import bindings, cuda, legacy, toolkit_parts
from toolchain.build.cuda import CudaChoice
from toolchain.build.options import BuildOptions, choose_options, tree_options
from toolchain.build.pin import DEFAULT_PIN, SourceTree, parse_pin
from toolchain.build.solve import Jobs, choose_jobs
from toolchain.build.source import fetch_source
from toolchain.build.toolkit import Toolkit, find_toolkits
from toolchain.build.variants import Variant, choose_variants, require_needs
from toolchain.build.webui import page_defines

# What cmake and the compilers read from the environment.
FLAGS = re.compile(r"(C|CXX|CPP|LD|CUDA)FLAGS|CMAKE_\w+")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the user asked for.

    ``defines`` are ``NAME=VALUE`` for cmake, ``variants`` names of rows of ``variants.VARIANTS``; ``cuda_toolkit`` is a
    folder or ``index``; ``legacy`` asks for the trainer of 2023. ``source`` None: the default pin of what is asked.
    """

    source: str | None = None
    defines: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    cuda_arch: tuple[str, ...] = ()
    cuda_toolkit: str | None = None
    legacy: bool = False
    jobs: int | None = None
    update: bool = False


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A request resolved on this machine: everything that the Toolchain's id stands for."""

    request: BuildRequest
    tree: SourceTree
    options: BuildOptions
    variants: tuple[Variant, ...]
    cuda: CudaChoice | None
    c: Compiler
    cxx: Compiler
    jobs: Jobs
    machine: Machine
    id: str
    driver_stub: Path | None = None

    @property
    def legacy(self) -> bool:
        return self.request.legacy

    @property
    def toolkit(self) -> Toolkit | None:
        return self.cuda.toolkit if self.cuda else None


def configure(request: BuildRequest) -> Configuration:
    """Fetch the source and settle the rest; of a CUDA toolkit nothing is fetched yet (see ``with_toolkit``).

    Starts no process when all is known and no variant needs anything of the machine.
    """
    variants = choose_variants(request.variants)
    machine = probe()
    c, cxx = find_compiler("c"), find_compiler("c++")
    tree = fetch_tree(request)
    if request.legacy:
        legacy.require_trainer(tree)
    # a tree may carry its page ready-made: then there is nothing to switch on
    variants = tuple(replace(v, defines=page_defines(tree.llama)) if v.name == "ui" else v for v in variants)
    options = _options(request, tree, variants)
    require_needs(variants, cxx)
    choice = None
    if any(variant.name == "cuda" for variant in variants):
        choice = _solve(request, machine)
        options = _options(request, tree, variants, choice)
    return Configuration(
        request=request,
        tree=tree,
        options=options,
        variants=variants,
        cuda=choice,
        c=c,
        cxx=cxx,
        jobs=choose_jobs(machine, request.jobs, cuda=choice is not None),
        machine=machine,
        id=toolchain_id(tree, options, compilers_of(c, cxx, choice), machine, trainer=request.legacy),
    )


def with_toolkit(configuration: Configuration) -> Configuration:
    """``configuration`` with its CUDA toolkit whole: fetched, completed with cuBLAS, and a stand-in for libcuda where
    the tree must link with one, and toolkit and driver do not both bring it.
    """
    choice = configuration.cuda
    if choice is None:
        return configuration
    toolkit = toolkit_parts.complete(choice.toolkit or toolkit_parts.fetch_toolkit(cuda.INDEX_RELEASE))
    choice, tree, stub = replace(choice, toolkit=toolkit), configuration.tree, None
    if not choice.vmm and "GGML_CUDA_NO_VMM" not in tree_options(tree.llama):
        # trees of before 2025 cannot be told to do without the driver's library
        stub = toolkit_parts.make_driver_stub(configuration.c)
    options = _options(configuration.request, tree, configuration.variants, choice, stub)
    return replace(configuration, cuda=choice, options=options, driver_stub=stub)


def _options(
    request: BuildRequest,
    tree: SourceTree,
    variants: Sequence[Variant],
    choice: CudaChoice | None = None,
    driver_stub: Path | None = None,
) -> BuildOptions:
    return choose_options(
        tree,
        request.defines,
        variants=variants,
        cuda=choice,
        driver_stub=driver_stub,
        defaults=legacy.default_defines(tree.llama) if request.legacy else None,
    )


def _solve(request: BuildRequest, machine: Machine) -> CudaChoice:
    compilers = host_compilers()
    if request.cuda_toolkit == "index":
        return cuda.from_index(compilers=compilers, machine=machine, asked=request.cuda_arch)
    found = find_toolkits(named=request.cuda_toolkit)
    return cuda.choose_cuda(toolkits=found, compilers=compilers, machine=machine, asked=request.cuda_arch)


def compilers_of(c: Compiler, cxx: Compiler, choice: CudaChoice | None) -> tuple[str, ...]:
    """What compiles this configuration, in words that change when the result may."""
    plain = (c.version, cxx.version)
    if choice is None:
        return plain
    nvcc = choice.toolkit.version if choice.toolkit else "{}.{} of the package index".format(*cuda.INDEX_RELEASE)
    return (*plain, f"nvcc {nvcc}", f"host {choice.host.version}")


def toolchain_id(
    tree: SourceTree, options: BuildOptions, compilers: Sequence[str], machine: Machine, *, trainer: bool = False
) -> str:
    """``COMMIT-DIGEST`` over source, bindings, options, compilers, their flags and, for native code, the CPU."""
    identity = {
        "source": tree.digest,
        "bindings": "none" if trainer else [bindings.LAYOUT, None if tree.bindings else DEFAULT_PIN],
        "options": options.defines,
        "environment": {name: value for name, value in sorted(os.environ.items()) if FLAGS.fullmatch(name)},
        "compilers": list(compilers),
        "system": [machine.system, machine.arch],
        "cpu": sorted(machine.cpu_flags) if options.native else None,
    }
    return f"{tree.short_commit}-{files.digest(identity)[:12]}"


def fetch_tree(request: BuildRequest) -> SourceTree:
    pin = parse_pin(request.source or (legacy.LEGACY_PIN if request.legacy else DEFAULT_PIN))
    with console.step(f"fetch {pin}", quiet_s=0.5) as step:
        return fetch_source(pin, update=request.update, on_progress=step.advance)
