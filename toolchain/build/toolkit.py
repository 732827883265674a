"""The CUDA toolkits on this machine: where they are and what they can."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, console, files
from toolchain.base.errors import CommandError, FoundryError, MissingError
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
    /opt/cuda. A named one that is not there is a MissingError, and one that cannot be asked its own error: the
    user meant it. Of the others, one that cannot be asked is passed over with a warning where there is another.
    """
    found: dict[Path, Toolkit] = {}
    broken: dict[Path, FoundryError] = {}
    for where, nvcc in _candidates(root, named):
        if not nvcc.is_file():
            if where in NAMED:
                raise MissingError(
                    f"{where} names no CUDA toolkit",
                    evidence=f"there is no {nvcc}",
                    hint=f"correct {where}, or unset it to have the toolkits of this machine found",
                )
            continue
        try:
            toolkit = ask(nvcc, where)
        except FoundryError as error:
            if where in NAMED:
                raise
            broken[nvcc.resolve()] = error
            continue
        found.setdefault(toolkit.root.resolve(), toolkit)
    for fault in broken.values():
        if not found:
            raise fault
        console.warn(f"{fault.message}: passed over")
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
    """The toolkit around ``nvcc``: what nvcc says of itself, remembered by its file, and what lies there.

    Raises CommandError when nvcc cannot be run, MissingError when it is none.
    """
    version, archs, root = _said(nvcc)
    release = (int(version.split(".")[0]), int(version.split(".")[1]))
    includes = [root / "include", *root.glob("targets/*/include")]
    # Debian's own packages spread the toolkit over /usr
    libraries = [root / "lib64", root / "lib", *root.glob("targets/*/lib"), *root.glob("lib/*-linux-gnu")]
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
    note = files.home_dir("work") / "compilers" / f"{files.sha256_text(f'nvcc {nvcc}')[:32]}.json"
    match files.read_json(note):
        case {"seen": seen, "version": str(known), "archs": [*listed], "root": str(top)}:
            if seen == _seen(nvcc, Path(top)):
                return known, frozenset(map(str, listed)), Path(top)
    version, archs, root = _version(nvcc), _architectures(nvcc), _root(nvcc)
    said = {"seen": _seen(nvcc, root), "version": version, "archs": sorted(archs), "root": str(root)}
    files.write_json(note, {"nvcc": str(nvcc), **said})
    return version, archs, root


def _seen(nvcc: Path, root: Path) -> list[list[object]]:
    """What tells whether nvcc has changed: its own file and, behind a wrapper, that of the toolkit."""
    resolved = [path.resolve() for path in (nvcc, root / "bin" / "nvcc") if path.exists()]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in resolved]


def _version(nvcc: Path) -> str:
    """``13.0.88``; MissingError when ``nvcc`` does not speak like one."""
    about = command.capture([nvcc, "--version"], what="asking nvcc's version", hint=_instead(nvcc))
    if found := re.search(r"\bV(\d+\.\d+\.\d+)", about):
        return found[1]
    raise MissingError(f"{nvcc} does not tell its version", evidence=about, hint=_instead(nvcc))


def _architectures(nvcc: Path) -> frozenset[str]:
    """The compute capabilities that ``nvcc`` lists; none when it is older than the question (CUDA 11.0)."""
    try:
        listed = command.capture([nvcc, "--list-gpu-arch"], what="asking nvcc's architectures")
    except CommandError:
        return frozenset()
    return frozenset(re.findall(r"\bcompute_(\d+)\b", listed))


def _root(nvcc: Path) -> Path:
    """The toolkit's folder. ``nvcc`` may be a wrapper or a link: what it takes for its toolkit counts.

    conda's and some distributions' nvcc name a folder of targets/ there, Debian's names none.
    """
    argv = (nvcc, "--dryrun", "-x", "cu", "/dev/null")
    shown = command.capture(argv, what="asking nvcc's folder", hint="nvcc needs gcc on PATH: apt-get install g++")
    top = re.search(r"^#\$ TOP=(.+)$", shown, re.MULTILINE)
    named = Path(os.path.normpath(top[1].strip())) if top else nvcc.parent.parent
    return next((root for root in (named, *named.parents[:2]) if (root / "bin" / "nvcc").is_file()), nvcc.parent.parent)


def _instead(nvcc: Path) -> str:
    return f"mend {nvcc} or take it away, or name another toolkit: --cuda-toolkit DIR, or --cuda-toolkit index"


def _host_limits(includes: list[Path]) -> tuple[int, int]:
    """(gcc, clang) that the toolkit's own ``crt/host_config.h`` takes at most; 0 where it does not tell."""
    headers = [folder / "crt" / "host_config.h" for folder in includes]
    text = next((header.read_text(errors="replace") for header in headers if header.is_file()), "")
    gcc = re.search(r"^#if __GNUC__ > (\d+)", text, re.MULTILINE)
    clang = re.search(r"__clang_major__ >= (\d+)", text)
    return int(gcc[1]) if gcc else 0, int(clang[1]) - 1 if clang else 0
