"""A CUDA toolkit made whole: cuBLAS, or all of it, from the package index's wheels.

A toolkit may lack cuBLAS (NVIDIA's own slim images, distributions, the index's compiler wheels). The missing part
comes from the ``nvidia-cublas`` wheel of the same release, and both are put together as links in a folder of
ours: nothing is written into the system's toolkit.
"""

from __future__ import annotations

import platform
import zipfile
from collections.abc import Sequence
from pathlib import Path

from toolchain.base import command, console, files
from toolchain.base.errors import FetchError, FoundryError, MissingError
from toolchain.base.machine import Compiler
from toolchain.build import index
from toolchain.build.cuda_facts import Release
from toolchain.build.toolkit import Toolkit, ask

TARGETS = {"x86_64": "x86_64-linux", "aarch64": "sbsa-linux"}
WHEELS_SINCE: Release = (13, 0)
"""The first release whose nvcc is in the index as wheels that fit together (``nvidia/cu13/``)."""
COMPILER_WHEELS = (
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
)

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

    Raises MissingError for a release that the index has no matching wheel of, FetchError when it cannot be had.
    """
    if toolkit.cublas:
        return toolkit
    release = "{}.{}".format(*toolkit.release)
    if toolkit.release[0] < 12:
        raise MissingError(
            f"{toolkit} has no cuBLAS",
            evidence=f"no cublas_v2.h in {toolkit.root}/include",
            hint=f"apt-get install libcublas-dev-{release.replace('.', '-')}",
        )
    name = "nvidia-cublas" if toolkit.release[0] >= 13 else f"nvidia-cublas-cu{toolkit.release[0]}"
    part = fetch_parts([f"{name}=={release}.*"])[0]
    folder = files.home_dir("sources") / f"cuda-{toolkit.version}-{files.digest([str(toolkit.root), part.name])[:12]}"
    with files.locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            with files.staged(folder) as partial:
                compose(partial, [toolkit.root, _inner(part)])
    return ask(folder / "bin" / "nvcc", f"{toolkit.found_by}, cuBLAS from {name}")


def fetch_toolkit(release: Release) -> Toolkit:
    """A whole toolkit of ``release`` (13.0 or newer) from the index's wheels, about 600 MB to download."""
    pinned = "{}.{}.*".format(*release)
    parts = fetch_parts([f"{name}=={pinned}" for name in (*COMPILER_WHEELS, "nvidia-cublas")])
    folder = files.home_dir("sources") / "cuda-wheels-{}.{}-{}".format(
        *release, files.digest([part.name for part in parts])[:12]
    )
    with files.locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            with files.staged(folder) as partial:
                compose(partial, [_inner(part) for part in parts])
    return ask(folder / "bin" / "nvcc", "the package index")


def compose(into: Path, roots: Sequence[Path]) -> None:
    """One toolkit of links below ``into``: every file of each root's bin, include, lib and nvvm.

    nvcc takes the folder above the path it was called by for its toolkit and looks in targets/ARCH below it.
    Libraries also get the name that the linker wants (``libcublas.so``), which wheels do not carry.
    """
    for folder, names in {
        "bin": ("bin",),
        "include": ("include",),
        "lib64": ("lib64", "lib"),
        "nvvm": ("nvvm",),
    }.items():
        (into / folder).mkdir(parents=True)
        for root in roots:
            source = next((root / name for name in names if (root / name).is_dir()), None)
            for entry in sorted(source.iterdir()) if source else ():
                link = into / folder / entry.name
                if not link.exists():
                    link.symlink_to(entry)
    for library in (into / "lib64").glob("lib*.so.*"):
        bare = library.with_name(library.name.partition(".so")[0] + ".so")
        if not bare.exists():
            bare.symlink_to(library.name)
    (into / "lib").symlink_to("lib64")
    target = into / "targets" / TARGETS.get(platform.machine(), f"{platform.machine()}-linux")
    target.mkdir(parents=True)
    (target / "include").symlink_to("../../include")
    (target / "lib").symlink_to("../../lib64")


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


def _fetch_part(requirement: str) -> Path:
    note = files.home_dir("sources") / "refs" / f"{files.sha256_text(requirement)[:32]}.json"
    match files.read_json(note):
        case {"folder": str(known)} if (files.home_dir("sources") / known).is_dir():
            return files.home_dir("sources") / known
    name = requirement.partition("==")[0]
    with console.step(f"fetch {requirement}") as step:
        finder = index.package_finder()
        link = index.best_link(finder, requirement, what=f"wheel of {requirement}")
        stated = index.stated_sha256(link)
        if stated is None:
            raise FetchError(f"the package index states no sha256 for {link.filename}", hint="use another index")
        folder = files.home_dir("sources") / f"{link.filename.split('-py')[0]}-{stated[:12]}"
        with files.locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                files.require_free(folder, 2 << 30, f"the wheel of {name}")
                with files.staged(folder) as partial:
                    partial.mkdir()
                    archive = partial / link.filename
                    try:
                        found = index.download(finder, link.normalized, archive, step.advance)
                        if found != stated:
                            raise index.wrong_hash(link.filename, expected=stated, found=found)
                        with zipfile.ZipFile(archive) as wheel:
                            wheel.extractall(partial)  # drops absolute names and ".." by itself
                    except (FoundryError, KeyboardInterrupt):
                        raise
                    except Exception as error:
                        full = files.disk_error(error, partial) if isinstance(error, OSError) else None
                        raise full or index.unreachable(link.filename, error) from error
                    archive.unlink()
                    for program in (*partial.glob("nvidia/*/bin/*"), *partial.glob("nvidia/*/nvvm/bin/*")):
                        program.chmod(0o755)
    files.write_json(note, {"requirement": requirement, "folder": folder.name})
    return folder


def _inner(part: Path) -> Path:
    """The folder of an unpacked wheel that holds include/ and lib/."""
    return next(p for p in sorted(part.glob("nvidia/*")) if p.is_dir())
