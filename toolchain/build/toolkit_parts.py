"""A CUDA toolkit made whole: cuBLAS, or all of it, from the package index's wheels.

A toolkit may lack cuBLAS (NVIDIA's own slim images, distributions, the index's compiler wheels). The missing part
comes from the ``nvidia-cublas`` wheel of the same release, and both are put together as links in a folder of
ours: nothing is written into the system's toolkit.
"""

from __future__ import annotations

import os
import platform
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.base import command, console, files
from toolchain.base.command import OnProgress
from toolchain.base.errors import FetchError, FoundryError, MissingError
from toolchain.base.machine import Compiler
from toolchain.build import index
from toolchain.build.cuda_facts import Release
from toolchain.build.toolkit import Toolkit, ask

if TYPE_CHECKING:
    from unearth import Link, PackageFinder

TARGETS = {"x86_64": "x86_64-linux", "aarch64": "sbsa-linux"}
PARTS = ("bin", "include", "lib", "nvvm")
"""Folders of a toolkit, and of a wheel's part of one, that count here."""
COMPILER_WHEELS = (
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
)
"""What nvcc needs to compile and link, in the index since CUDA 13.0 (``nvidia/cu13/``): the driver of the passes,
cicc and libdevice, ``crt/host_config.h``, cudart, CUB. 13.0.85 to 13.0.96 are parts of one release."""

DRIVER_FUNCTIONS = (
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuGetErrorString",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemAddressFree",
)
"""What llama.cpp calls of the driver itself, for its pool of virtual memory (100 is CUDA_ERROR_NO_DEVICE)."""


def complete(toolkit: Toolkit) -> Toolkit:
    """``toolkit`` with cuBLAS: itself when it has it, else put together with the index's wheel of its release.

    Raises MissingError for a toolkit that no wheel fits, FetchError when the wheel cannot be had. cuBLAS counts its
    own minor versions; the one that is named like the release is as old as it or older, and so fits it.
    """
    if toolkit.cublas:
        return toolkit
    release = "{}.{}".format(*toolkit.release)
    packaged = f"apt-get install libcublas-dev-{release.replace('.', '-')}"
    if toolkit.release[0] < 12 or toolkit.root == Path("/usr"):
        raise MissingError(
            f"{toolkit} has no cuBLAS",
            evidence=f"no cublas_v2.h and libcublas.so below {toolkit.root}",
            hint=packaged if toolkit.root != Path("/usr") else "apt-get install nvidia-cuda-dev",
        )
    name = "nvidia-cublas" if toolkit.release[0] >= 13 else f"nvidia-cublas-cu{toolkit.release[0]}"
    try:
        part = fetch_parts([f"{name}=={release}.*"])[0]
    except FetchError as error:
        hint = f"{error.hint}; or install cuBLAS: {packaged}"
        raise FetchError(f"{toolkit} has no cuBLAS: {error.message}", evidence=error.evidence, hint=hint) from error
    folder = f"cuda-{toolkit.version}-{files.digest([str(toolkit.root), part.name])[:12]}"
    return _composed(folder, [toolkit.root, _inner(part)], f"{toolkit.found_by}, cuBLAS from {name}")


def fetch_toolkit(release: Release) -> Toolkit:
    """A whole toolkit of ``release`` (13.0 or newer) from the index's wheels: 580 MB to download, 840 MB on disk."""
    pinned = "{}.{}.*".format(*release)
    parts = fetch_parts([f"{name}=={pinned}" for name in (*COMPILER_WHEELS, "nvidia-cublas")])
    folder = "cuda-wheels-{}.{}-{}".format(*release, files.digest([part.name for part in parts])[:12])
    return _composed(folder, [_inner(part) for part in parts], "the package index")


def compose(into: Path, roots: Sequence[Path]) -> None:
    """One toolkit of links below ``into``: every file of each root's bin, include, lib and nvvm, the first root's
    where several have it. ``into`` is a folder, or will be one of the same name, in FOUNDRY_HOME/sources: links to
    what lies there are relative and hold when FOUNDRY_HOME is moved.

    nvcc takes the folder above the path it was called by for its toolkit and looks in targets/ARCH below it.
    Libraries also get the name that the linker wants (``libcublas.so``), which wheels do not carry.
    """
    target = f"targets/{TARGETS.get(platform.machine(), f'{platform.machine()}-linux')}"
    for folder, names in {
        "bin": ("bin",),
        "include": ("include", f"{target}/include"),
        "lib64": ("lib64", "lib", f"{target}/lib"),
        "nvvm": ("nvvm",),
    }.items():
        (into / folder).mkdir(parents=True)
        for source in (root / name for root in roots for name in names if (root / name).is_dir()):
            for entry in sorted(source.iterdir()):
                link = into / folder / entry.name
                if not os.path.lexists(link):
                    link.symlink_to(_from_folder(entry))
    for library in sorted((into / "lib64").glob("lib*.so.*"), key=lambda path: len(path.name)):
        bare = library.with_name(library.name.partition(".so")[0] + ".so")
        if not os.path.lexists(bare):
            bare.symlink_to(library.name)
    (into / "lib").symlink_to("lib64")
    (into / target).mkdir(parents=True)
    (into / target / "include").symlink_to("../../include")
    (into / target / "lib").symlink_to("../../lib64")


def make_driver_stub(compiler: Compiler) -> Path:
    """A folder with ``libcuda.so`` to link with where neither toolkit nor driver brings one, and ``run/libcuda.so.1``.

    The first has nothing behind its names and the loader never finds it (its soname is another), so a real driver
    is always the one that runs; the second lets a machine without a driver start such programs for their proof.
    """
    folder = files.home_dir("sources") / f"cuda-driver-stub-{files.digest(DRIVER_FUNCTIONS)[:12]}"
    with files.locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            with files.staged(folder) as partial:
                (partial / "run").mkdir(parents=True)
                source = partial / "stub.c"
                source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER_FUNCTIONS))
                library = partial / "libcuda.so"
                argv = (compiler.path, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source)
                command.run(argv, what="making a stand-in for libcuda to link with")
                (partial / "run" / "libcuda.so.1").symlink_to("../libcuda.so")
    return folder


def wheel_folders(major: int) -> tuple[str, ...]:
    """Where NVIDIA's wheels of a major CUDA release keep their libraries, below site-packages."""
    return ("nvidia/cu13/lib",) if major >= 13 else ("nvidia/cublas/lib", "nvidia/cuda_runtime/lib")


def wheel_needs(major: int) -> tuple[str, ...]:
    """The requirements by which a wheel gets cuBLAS and the CUDA runtime from the index."""
    if major >= 13:
        return (f"nvidia-cublas=={major}.*", f"nvidia-cuda-runtime=={major}.*")
    return (f"nvidia-cublas-cu{major}", f"nvidia-cuda-runtime-cu{major}")


def fetch_parts(requirements: Sequence[str]) -> list[Path]:
    """Each requirement's wheel, unpacked once in FOUNDRY_HOME/sources; FetchError when one cannot be had."""
    return [_fetch_part(requirement) for requirement in requirements]


def _composed(name: str, roots: Sequence[Path], found_by: str) -> Toolkit:
    """``roots`` put together once, as FOUNDRY_HOME/sources/``name``."""
    folder = files.home_dir("sources") / name
    with files.locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            with files.staged(folder) as partial:
                compose(partial, roots)
    return ask(folder / "bin" / "nvcc", found_by)


def _from_folder(entry: Path) -> Path:
    """What a link in ``sources/COMPOSED/bin`` says to reach ``entry``: relative when it lies in sources, too."""
    sources = files.home_dir("sources")
    return Path("../..") / entry.relative_to(sources) if entry.is_relative_to(sources) else entry


def _inner(part: Path) -> Path:
    """The folder of an unpacked wheel that holds include/ and lib/: nvidia/cu13, nvidia/cublas."""
    return next(folder.parent for folder in sorted(part.glob("nvidia/*/*")) if folder.name in PARTS)


def _fetch_part(requirement: str) -> Path:
    sources = files.home_dir("sources")
    note = sources / "refs" / f"{files.sha256_text(requirement)[:32]}.json"
    match files.read_json(note):
        case {"folder": str(known)} if (sources / known).is_dir():
            return sources / known
    with console.step(f"fetch {requirement}") as step:
        finder = index.package_finder(wheel_of=[requirement.partition("==")[0]])
        link = index.best_link(finder, requirement, what=f"wheel of {requirement}")
        stated = index.stated_sha256(link)
        if stated is None:
            raise FetchError(f"the package index states no sha256 for {link.filename}", hint="use another index")
        folder = sources / f"{link.filename.split('-py')[0]}-{stated[:12]}"
        with files.locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                files.require_free(folder, 2 << 30, link.filename)
                with files.staged(folder) as partial:
                    partial.mkdir()
                    archive = partial / link.filename
                    _download(finder, link, stated, archive, step.advance)
                    _unpack(archive, partial)
    files.write_json(note, {"requirement": requirement, "folder": folder.name})
    return folder


def _download(finder: PackageFinder, link: Link, stated: str, archive: Path, on_progress: OnProgress) -> None:
    try:
        found = index.download(finder, link.normalized, archive, on_progress)
    except FoundryError:
        raise
    except Exception as error:  # the client library's own errors have no common root
        full = files.disk_error(error, archive) if isinstance(error, OSError) else None
        raise full or index.unreachable(link.filename, error) from error
    if found != stated:
        raise index.wrong_hash(link.filename, expected=stated, found=found)


def _unpack(archive: Path, into: Path) -> None:
    """The wheel's files below ``into``, its programs executable; the archive is taken away."""
    try:
        with files.disk_errors(into), zipfile.ZipFile(archive) as wheel:
            wheel.extractall(into)  # drops absolute names and ".." by itself
        if not any(folder.name in PARTS for folder in into.glob("nvidia/*/*")):
            raise zipfile.BadZipFile("it is no part of CUDA: it has no nvidia/*/include")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        hint = "the index serves a damaged file under a right hash: use another index"
        raise FetchError(f"{archive.name} cannot be unpacked", evidence=str(error), hint=hint) from error
    for program in (*into.glob("nvidia/*/bin/*"), *into.glob("nvidia/*/nvvm/bin/*")):
        program.chmod(0o755)
    archive.unlink()
