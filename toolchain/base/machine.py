"""What this machine has: CPUs that we may use (``topology.py``), memory, compilers, GPUs.

Everything is read from files (cgroup v1 and v2, /proc, /sys), below a root that tests can replace; no
process is started except once per compiler, for its version, and on macOS.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from toolchain.base import command, files
from toolchain.base.errors import MissingError
from toolchain.base.gpu import Driver, Gpu, probe_gpus
from toolchain.base.topology import Cpus, cgroup_folders, read_cpus, read_text

WRAPPERS = frozenset({"ccache", "sccache", "distcc"})
"""What stands before a compiler: its file tells nothing of the compiler's version, which is asked each time."""


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A C or C++ compiler: where it is and the first line of what it says of itself."""

    path: Path
    version: str

    @property
    def family(self) -> str:
        """``gcc`` or ``clang``."""
        return "clang" if "clang" in self.version.lower() else "gcc"

    @property
    def major(self) -> int:
        """The major version, from such lines as ``g++ (Debian 12.2.0-14) 12.2.0`` and ``clang version 18.1.3``."""
        bare = re.sub(r"\([^)]*\)", "", self.version)
        found = re.search(r"\b(\d+)(\.\d+)+", bare) or re.search(r"(\d+)", bare)
        return int(found[1]) if found else 0


@dataclass(frozen=True, kw_only=True)
class Machine(Cpus):
    """A machine as a process on it may use it: its CPUs, and beside them memory and GPUs.

    ``ram_bytes`` is the smaller of physical memory and the cgroup's limit; ``available_bytes`` what of it is
    free now.
    """

    system: str
    arch: str
    cpu_model: str
    cpu_flags: frozenset[str] = field(repr=False)
    ram_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    driver: Driver | None = None


def probe(root: Path = Path("/")) -> Machine:
    """Read the machine. ``root`` stands for ``/``: tests lay out a machine of their own there."""
    model, flags = _cpu_model(root)
    gpus, driver = probe_gpus(root)
    total, available = _memory(root)
    for limit, used in _memory_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Machine(
        **vars(read_cpus(root)),
        system=platform.system(),
        arch=platform.machine(),
        cpu_model=model,
        cpu_flags=flags,
        ram_bytes=total,
        available_bytes=available,
        gpus=gpus,
        driver=driver,
    )


def find_compiler(language: str) -> Compiler:
    """The C (``c``) or C++ (``c++``) compiler that cmake would take: CC or CXX, else the usual names.

    The version is asked of the compiler once and remembered by its file's size and mtime. Raises
    MissingError when there is none.
    """
    variable, names = ("CC", ("cc", "gcc", "clang")) if language == "c" else ("CXX", ("c++", "g++", "clang++"))
    named = os.environ.get(variable)
    for name in (named,) if named else names:
        if found := shutil.which(name):
            return Compiler(path=Path(found), version=_compiler_version(Path(found)))
    raise MissingError(
        f"no {language.upper()} compiler",
        evidence=f"{variable}={named}: not found" if named else f"looked on PATH for: {', '.join(names)}",
        hint="install one: `apt-get install build-essential` (Debian), `dnf install gcc-c++` (Fedora), "
        "`xcode-select --install` (macOS)",
    )


def host_compilers() -> tuple[Compiler, ...]:
    """C++ compilers that nvcc may call: the usual one first, then g++-N and clang++-N on PATH.

    CUDAHOSTCXX or NVCC_CCBIN, which nvcc and cmake honour, stand before the usual one.
    """
    named = os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN")
    if named and (found := shutil.which(named)):
        return (Compiler(path=Path(found), version=_compiler_version(Path(found))),)
    numbered = [f"{name}-{major}" for name in ("g++", "clang++") for major in range(30, 6, -1)]
    others = [Path(found) for name in numbered if (found := shutil.which(name))]
    return find_compiler("c++"), *(Compiler(path=path, version=_compiler_version(path)) for path in others)


def _compiler_version(path: Path) -> str:
    real = path.resolve()
    stat = real.stat()
    seen = [str(path), str(real), stat.st_size, stat.st_mtime_ns]
    note = files.home_dir("work") / "compilers" / f"{files.digest(seen)[:32]}.json"
    match files.read_json(note):
        case {"version": str(version)} if real.name not in WRAPPERS:
            return version
    said = command.capture([path, "--version"], what="asking the compiler's version").splitlines()
    version = said[0].strip() if said else "unknown"
    files.write_json(note, {"seen": seen, "version": version})
    return version


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every memory cgroup on our path; file cache that can be dropped is not used."""
    found: list[tuple[int, int]] = []
    for version, folder in cgroup_folders(root, "memory"):
        if version == 2:
            limit, used, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        if (most := read_text(folder / limit)).isdigit():
            droppable = re.search(rf"^{cache} (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
            taken = int(read_text(folder / used) or 0) - (int(droppable[1]) if droppable else 0)
            found.append((int(most), max(0, taken)))
    return found


def _memory(root: Path) -> tuple[int, int]:
    """(total, available) in bytes."""
    text = read_text(root / "proc/meminfo")
    total = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    available = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    if total and available:
        return int(total[1]) * 1024, int(available[1]) * 1024
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _cpu_model(root: Path) -> tuple[str, frozenset[str]]:
    text = read_text(root / "proc/cpuinfo")
    model = re.search(r"^(?:model name|Model|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        model[1].strip() if model else platform.processor() or platform.machine(),
        frozenset(flags[1].split()) if flags else frozenset(),
    )
