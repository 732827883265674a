"""The CUDA toolkits on this machine: where they are and what they can."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, files
from toolchain.base.errors import MissingError
from toolchain.build.cuda_facts import Release, known_architectures, newest_compiler

NAMED = ("--cuda-toolkit", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
"""By which a user names a toolkit: an option and environment variables."""


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """A CUDA toolkit. ``archs`` are what its nvcc compiles for; ``gcc_max`` and ``clang_max`` the newest host
    compilers that it takes; ``driver_stub`` whether programs can be linked with libcuda without a driver.
    """

    root: Path
    version: str
    found_by: str
    archs: frozenset[str]
    gcc_max: int
    clang_max: int
    cublas: bool = True
    driver_stub: bool = True

    @property
    def release(self) -> Release:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def lib_dir(self) -> Path:
        return self.root / "lib64" if (self.root / "lib64").exists() else self.root / "lib"

    def __str__(self) -> str:
        return f"CUDA {self.version} ({self.found_by})"


def find_toolkits(root: Path = Path("/"), *, named: str | None = None) -> tuple[Toolkit, ...]:
    """The toolkits of this machine, the one that the user named first.

    Looked for in ``named`` (a folder), CUDACXX, CUDA_HOME and CUDA_PATH, nvcc on PATH, /usr/local/cuda* and
    /opt/cuda. A named one that is not there is a MissingError: the user meant it.
    """
    found: dict[Path, Toolkit] = {}
    for where, nvcc in _candidates(root, named):
        if not nvcc.is_file():
            if where in NAMED:
                raise MissingError(
                    f"{where} names no CUDA toolkit",
                    evidence=f"there is no {nvcc}",
                    hint=f"correct {where}, or unset it to have the toolkits of this machine found",
                )
            continue
        toolkit = ask(nvcc, where)
        found.setdefault(toolkit.root.resolve(), toolkit)
    return tuple(found.values())


def _candidates(root: Path, wanted: str | None) -> list[tuple[str, Path]]:
    named = [("--cuda-toolkit", Path(wanted).absolute() / "bin" / "nvcc")] if wanted else []
    if cudacxx := os.environ.get("CUDACXX"):
        named.append(("CUDACXX", Path(shutil.which(cudacxx) or cudacxx)))
    for variable in NAMED[2:]:
        if home := os.environ.get(variable):
            named.append((variable, Path(home) / "bin" / "nvcc"))
    if on_path := shutil.which("nvcc"):
        named.append(("PATH", Path(on_path)))
    installed = sorted((root / "usr/local").glob("cuda*"), key=_by_version, reverse=True)
    return [*named, *((str(folder), folder / "bin" / "nvcc") for folder in (*installed, root / "opt/cuda"))]


def _by_version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", folder.name))


def ask(nvcc: Path, found_by: str) -> Toolkit:
    """The toolkit around ``nvcc``: what nvcc says of itself, remembered by its file, and what lies there."""
    version, archs, root = _said(nvcc)
    release = (int(version.split(".")[0]), int(version.split(".")[1]))
    includes = [root / "include", *root.glob("targets/*/include")]
    libraries = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    gcc, clang = _host_limits(includes)
    return Toolkit(
        root=root,
        version=version,
        found_by=found_by,
        archs=archs or known_architectures(release),
        gcc_max=gcc or newest_compiler(release, "gcc"),
        clang_max=clang or newest_compiler(release, "clang"),
        cublas=any((folder / "cublas_v2.h").exists() for folder in includes)
        and any((folder / "libcublas.so").exists() for folder in libraries),
        driver_stub=any((folder / "stubs" / "libcuda.so").exists() for folder in libraries),
    )


def _said(nvcc: Path) -> tuple[str, frozenset[str], Path]:
    """(version, architectures, root): three questions to nvcc, asked again only when its file has changed."""
    stat = nvcc.resolve().stat()
    seen = ["nvcc", str(nvcc), str(nvcc.resolve()), stat.st_size, stat.st_mtime_ns]
    note = files.home_dir("work") / "compilers" / f"{files.digest(seen)[:32]}.json"
    match files.read_json(note):
        case {"version": str(version), "archs": [*archs], "root": str(root)}:
            return version, frozenset(map(str, archs)), Path(root)
    about = command.capture([nvcc, "--version"], what="asking nvcc's version")
    listed = command.capture([nvcc, "--list-gpu-arch"], what="asking nvcc's architectures")
    shown = command.capture([nvcc, "--dryrun", "-x", "cu", "/dev/null"], what="asking nvcc's folder")
    found = re.search(r"\bV(\d+\.\d+\.\d+)", about)
    if found is None:
        raise MissingError(f"{nvcc} does not tell its version", evidence=about, hint="install CUDA 11 or newer")
    # nvcc may be a wrapper or a link: the folder that it takes for its toolkit counts
    top = re.search(r"^#\$ TOP=(.+)$", shown, re.MULTILINE)
    said = {
        "version": found[1],
        "archs": re.findall(r"compute_(\d+)\b", listed),
        "root": os.path.normpath(top[1].strip()) if top else str(nvcc.parent.parent),
    }
    files.write_json(note, said)
    return str(said["version"]), frozenset(said["archs"]), Path(str(said["root"]))


def _host_limits(includes: list[Path]) -> tuple[int, int]:
    """(gcc, clang) that the toolkit's own ``crt/host_config.h`` takes at most; 0 where it does not tell."""
    headers = [folder / "crt" / "host_config.h" for folder in includes]
    text = next((header.read_text(errors="replace") for header in headers if header.is_file()), "")
    gcc = re.search(r"^#if __GNUC__ > (\d+)", text, re.MULTILINE)
    clang = re.search(r"__clang_major__ >= (\d+)", text)
    return int(gcc[1]) if gcc else 0, int(clang[1]) - 1 if clang else 0
