"""The CPUs that this process may use: mask, quota, cores, their kinds and their memory nodes.

Everything is read from files below a root that tests can replace, except on macOS, whose kernel is asked by sysctl.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolchain.base import command
from toolchain.base.errors import FoundryError

SAME_CAPACITY: Final = 0.6
"""Of the fastest core's ``cpu_capacity``: little cores have 0.25 to 0.5 of it, middle ones in phones 0.7 and more."""
SAME_FREQUENCY: Final = 0.8
"""Of the fastest core's top frequency: favoured cores of one kind differ by a tenth, compact ones reach two thirds."""

_CPU: Final = "sys/devices/system/cpu"


@dataclass(frozen=True, kw_only=True)
class Threads:
    """A number of threads and why it is that."""

    count: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Cpus:
    """The CPUs that a process may use.

    ``cpus`` counts logical CPUs in our affinity mask, ``cores`` the physical cores behind them, ``quota`` the CPUs'
    worth of time that the cgroup grants (None: no limit). Where cores are of different kinds, ``performance_cpus``
    and ``performance_cores`` count the fast ones and ``kinds`` says what told them apart. ``node_cores`` are the cores
    to compute on in each NUMA node of which we may use any.
    """

    cpus: int
    cores: int
    quota: float | None
    performance_cpus: int | None = None
    performance_cores: int | None = None
    kinds: str = ""
    node_cores: tuple[int, ...] = ()

    @property
    def usable_cpus(self) -> int:
        """Logical CPUs that can be busy at once: affinity and quota, the quota rounded down, at least 1."""
        return self.cpus if self.quota is None else max(1, min(self.cpus, int(self.quota)))

    @property
    def compute_threads(self) -> int:
        return self.generation_threads.count

    @property
    def generation_threads(self) -> Threads:
        """One thread per physical core of the fast kind, within affinity and quota.

        A second hyper-thread shares its core's vector units (llama.cpp discussion 572; its own default,
        ``common_cpu_get_num_math``, skips it too). Slow cores stay out: every operation of the graph ends in a
        barrier, and the rows of a single token's product are mostly dealt out beforehand, so each step lasts as long
        as the slowest core's share ("efficiency cores harm lockstep threading", common.cpp there). All NUMA nodes
        count, as in llama.cpp without ``--numa``: no number of threads keeps them on one node, only a mask does.
        """
        cores = self.cores if self.performance_cores is None else self.performance_cores
        return self._within_quota(cores, self._core_reason(cores))

    @property
    def prompt_threads(self) -> Threads:
        """One thread per logical CPU of the fast kind, within affinity and quota.

        A prompt's products are bound by arithmetic, where a second hyper-thread fills what the first leaves idle.
        """
        cpus = self.cpus if self.performance_cpus is None else self.performance_cpus
        share = f"{cpus} of {self.cpus} CPUs: those of the performance cores ({self.kinds})"
        return self._within_quota(cpus, share if cpus < self.cpus else self._all())

    def _within_quota(self, count: int, reason: str) -> Threads:
        if self.usable_cpus >= count:
            return Threads(count=count, reason=reason)
        return Threads(
            count=self.usable_cpus, reason=f"{self.usable_cpus} of {self.cpus} CPUs: cgroup quota {_plain(self.quota)}"
        )

    def _core_reason(self, cores: int) -> str:
        nodes = ""
        if len(self.node_cores) > 1:
            nodes = f", on {len(self.node_cores)} NUMA nodes ({' + '.join(map(str, self.node_cores))})"
        if cores == self.cpus:
            return self._all() + nodes
        if self.performance_cores is not None:
            slow = f"{self.cores - cores} slower cores would hold up each step ({self.kinds})"
            return f"{cores} of {self.cpus} CPUs: one per performance core, {slow}{nodes}"
        return f"{cores} of {self.cpus} CPUs: one per physical core{nodes}"

    def _all(self) -> str:
        return f"all {self.cpus} CPUs that we may use" if self.cpus > 1 else "the one CPU that we may use"


def read_cpus(root: Path = Path("/")) -> Cpus:
    """The CPUs as the files below ``root`` show them; without topology files every CPU is a core of its own."""
    if sys.platform == "darwin" and root == Path("/"):
        return _apple_cpus()
    mask = _affinity(root)
    cores = {cpu: _core(root, cpu) for cpu in mask}
    fast, kinds = _performance_cpus(root, mask)
    nodes = [_cpu_list(read_text(path)) & fast for path in _numbered(root / "sys/devices/system/node", "node*/cpulist")]
    return Cpus(
        cpus=len(mask),
        cores=len(set(cores.values())),
        quota=_quota(root),
        performance_cpus=len(fast) if kinds else None,
        performance_cores=len({cores[cpu] for cpu in fast}) if kinds else None,
        kinds=kinds,
        node_cores=tuple(len({cores[cpu] for cpu in node}) for node in nodes if node),
    )


def cgroup_folders(root: Path, controller: str) -> list[tuple[int, Path]]:
    """(cgroup version, folder) for our group and each group above it that is mounted, innermost first.

    ``/proc/self/mountinfo`` tells where the hierarchies are and which group each mount shows: a container often
    sees its own group as the top, with or without a cgroup namespace; else the usual places are taken.
    """
    mounts = _cgroup_mounts(root)
    found: list[tuple[int, Path]] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, controllers, inner = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            version, key, usual = 2, "", ("sys/fs/cgroup/unified", "sys/fs/cgroup")
        elif controller in controllers.split(","):
            version, key, usual = 1, controller, (f"sys/fs/cgroup/{controller}", f"sys/fs/cgroup/{controllers}")
        else:
            continue
        shown, mount = mounts.get(key, ("/", None))
        if mount is None:
            mount = next((root / name for name in usual if (root / name).exists()), root / usual[0])
        folder = mount / _below(inner, shown)
        while folder != mount and not folder.exists():  # a group of the host that is not mounted here
            folder = folder.parent
        found.extend((version, each) for each in (folder, *folder.parents) if mount in (each, *each.parents))
    return found


def read_text(path: Path) -> str:
    """The stripped text of ``path``; empty when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _plain(quota: float | None) -> str:
    assert quota is not None
    return f"{quota:.1f}" if round(quota, 1) == quota else f"{quota:.2f}"


def _affinity(root: Path) -> frozenset[int]:
    """Our mask, which the kernel keeps within cpuset groups, less CPUs that are off: some kernels list those too."""
    listed = re.search(r"^Cpus_allowed_list:\s*(\S+)", read_text(root / "proc/self/status"), re.MULTILINE)
    mask = _cpu_list(listed[1]) if listed else frozenset[int]()
    online = _cpu_list(read_text(root / _CPU / "online"))
    return (mask & online) or mask or online or frozenset(range(os.cpu_count() or 1))


def _cpu_list(text: str) -> frozenset[int]:
    """The kernel's list form, ``0-3,8``."""
    cpus: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _core(root: Path, cpu: int) -> frozenset[int]:
    """The CPUs that share a physical core with ``cpu``, itself among them."""
    folder = root / _CPU / f"cpu{cpu}/topology"
    siblings = read_text(folder / "core_cpus_list") or read_text(folder / "thread_siblings_list")
    return _cpu_list(siblings) | {cpu}


def _performance_cpus(root: Path, mask: frozenset[int]) -> tuple[frozenset[int], str]:
    """Which CPUs of ``mask`` are of the fast kind, and what told so: empty where all are alike."""
    intel = _cpu_list(read_text(root / "sys/devices/cpu_core/cpus")) & mask
    if intel and intel != mask and _cpu_list(read_text(root / "sys/devices/cpu_atom/cpus")) & mask:
        return intel, "P and E cores"
    for name, least, told in (
        ("cpu_capacity", SAME_CAPACITY, "by cpu_capacity"),
        ("cpufreq/cpuinfo_max_freq", SAME_FREQUENCY, "by top frequency"),
    ):
        figures = _figures(root, mask, name)
        if len(figures) < len(mask):
            continue
        fast = frozenset(cpu for cpu, figure in figures.items() if figure >= least * max(figures.values()))
        if fast != mask:
            return fast, told
    return mask, ""


def _figures(root: Path, mask: Iterable[int], name: str) -> Mapping[int, int]:
    texts = {cpu: read_text(root / _CPU / f"cpu{cpu}" / name) for cpu in mask}
    return {cpu: int(text) for cpu, text in texts.items() if text.isdigit()}


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Files that match, in the order of the first number in their path below ``folder``."""

    def number(path: Path) -> int:
        found = re.search(r"\d+", str(path.relative_to(folder)))
        return int(found[0]) if found else -1

    return sorted(folder.glob(pattern), key=number)


def _quota(root: Path) -> float | None:
    """CPUs granted by the tightest cgroup on our path: v2 ``cpu.max``, v1 ``cpu.cfs_quota_us``."""
    quotas: list[float] = []
    for version, folder in cgroup_folders(root, "cpu"):
        if version == 2:
            quota, _, period = read_text(folder / "cpu.max").partition(" ")
        else:
            quota, period = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroup_mounts(root: Path) -> dict[str, tuple[str, Path]]:
    """(group that is shown, mount point) by controller; the one hierarchy of version 2 under an empty name."""
    found: dict[str, tuple[str, Path]] = {}
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, about = mount.split(), kind.split()
        if len(fields) < 5 or len(about) < 3 or about[0] not in ("cgroup", "cgroup2"):
            continue
        place = fields[3], root / fields[4].lstrip("/")
        for name in [""] if about[0] == "cgroup2" else about[2].split(","):
            found.setdefault(name, place)
    return found


def _below(group: str, shown: str) -> str:
    """``group`` as a path below a mount that shows the group ``shown``; the mount itself for one outside of it."""
    if ".." in group.split("/"):
        return ""
    if group == shown or group.startswith(f"{shown.rstrip('/')}/"):
        return group[len(shown.rstrip("/")) :].lstrip("/")
    return ""


def _apple_cpus() -> Cpus:
    """``hw.perflevel0`` are the performance cores; Macs without levels have cores of one kind (sysctl(3))."""
    figures: dict[str, int] = {}
    for name in ("hw.logicalcpu", "hw.physicalcpu", "hw.perflevel0.logicalcpu", "hw.perflevel0.physicalcpu"):
        with suppress(FoundryError, ValueError):
            figures[name] = int(command.capture(["sysctl", "-n", name], what="asking for the cores"))
    cpus = figures.get("hw.logicalcpu") or os.cpu_count() or 1
    cores = figures.get("hw.physicalcpu") or cpus
    fast = figures.get("hw.perflevel0.physicalcpu", cores)
    levels = fast < cores
    return Cpus(
        cpus=cpus,
        cores=cores,
        quota=None,
        performance_cpus=figures.get("hw.perflevel0.logicalcpu", fast) if levels else None,
        performance_cores=fast if levels else None,
        kinds="performance levels" if levels else "",
    )
