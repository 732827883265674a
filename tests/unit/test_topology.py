"""Described machines: the files that such a kernel shows go in, numbers of threads come out, with their reasons."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from toolchain.base.topology import Cpus, cgroup_folders, read_cpus

CPU = "sys/devices/system/cpu"


@dataclass(frozen=True, kw_only=True)
class Described:
    """A machine: its mask and its files; and what must come of it."""

    mask: str
    files: Mapping[str, str] = field(default_factory=dict)
    generation: tuple[int, str]
    prompt: tuple[int, str]


def lay_out(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def siblings(*groups: str) -> dict[str, str]:
    """``0,8`` and ``0-1`` say which CPUs share a core, one group for each core."""
    found = {}
    for group in groups:
        first, dash, last = group.partition("-")
        cpus = range(int(first), int(last) + 1) if dash else map(int, group.split(","))
        found.update({f"{CPU}/cpu{cpu}/topology/core_cpus_list": group for cpu in cpus})
    return found


def each(name: str, figures: Iterable[int]) -> dict[str, str]:
    return {f"{CPU}/cpu{cpu}/{name}": str(figure) for cpu, figure in enumerate(figures)}


def nodes(*lists: str) -> dict[str, str]:
    return {f"sys/devices/system/node/node{number}/cpulist": cpus for number, cpus in enumerate(lists)}


LAPTOP = {  # 6P+8E: an Intel Core i7-12800H
    "sys/devices/cpu_core/cpus": "0-11",
    "sys/devices/cpu_atom/cpus": "12-19",
    **siblings("0-1", "2-3", "4-5", "6-7", "8-9", "10-11", *(str(cpu) for cpu in range(12, 20))),
}
EPYC = {  # two sockets of 48 cores, the second threads numbered behind all first ones
    **siblings(*(f"{cpu},{cpu + 96}" for cpu in range(96))),
    **nodes("0-47,96-143", "48-95,144-191"),
}
DOCKER_V1 = {
    "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n0::/docker/abc",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",  # docker mounts its own group as the top
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
}
ALL_64 = "all 64 CPUs that we may use"
MACHINES = {
    "a desktop of eight plain cores": Described(
        mask="0-7",
        files=siblings(*map(str, range(8))),
        generation=(8, "all 8 CPUs that we may use"),
        prompt=(8, "all 8 CPUs that we may use"),
    ),
    "a laptop of 6 performance and 8 efficiency cores": Described(
        mask="0-19",
        files=LAPTOP,
        generation=(
            6,
            "6 of 20 CPUs: one per performance core, 8 slower cores would hold up each step (P and E cores)",
        ),
        prompt=(12, "12 of 20 CPUs: those of the performance cores (P and E cores)"),
    ),
    "that laptop's efficiency cores alone": Described(
        mask="12-19",
        files=LAPTOP,
        generation=(8, "all 8 CPUs that we may use"),
        prompt=(8, "all 8 CPUs that we may use"),
    ),
    "that laptop with a quota of four": Described(
        mask="0-19",
        files={**LAPTOP, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"},
        generation=(4, "4 of 20 CPUs: cgroup quota 4.0"),
        prompt=(4, "4 of 20 CPUs: cgroup quota 4.0"),
    ),
    "an EPYC of two NUMA nodes and 192 threads": Described(
        mask="0-191",
        files=EPYC,
        generation=(96, "96 of 192 CPUs: one per physical core, on 2 NUMA nodes (48 + 48)"),
        prompt=(192, "all 192 CPUs that we may use"),
    ),
    "one node of it (numactl --cpunodebind=1)": Described(
        mask="48-95,144-191",
        files=EPYC,
        generation=(48, "48 of 96 CPUs: one per physical core"),
        prompt=(96, "all 96 CPUs that we may use"),
    ),
    "a server of 96 cores and 192 threads on one node": Described(
        mask="0-191",
        files={**siblings(*(f"{cpu},{cpu + 96}" for cpu in range(96))), **nodes("0-191")},
        generation=(96, "96 of 192 CPUs: one per physical core"),
        prompt=(192, "all 192 CPUs that we may use"),
    ),
    "a Raspberry Pi": Described(
        mask="0-3",
        files={**siblings("0", "1", "2", "3"), **each("cpufreq/cpuinfo_max_freq", [2_400_000] * 4)},
        generation=(4, "all 4 CPUs that we may use"),
        prompt=(4, "all 4 CPUs that we may use"),
    ),
    "a phone: four little, three big, one prime core": Described(
        mask="0-7",
        files=each("cpu_capacity", [325, 325, 325, 325, 855, 855, 855, 1024]),
        generation=(
            4,
            "4 of 8 CPUs: one per performance core, 4 slower cores would hold up each step (by cpu_capacity)",
        ),
        prompt=(4, "4 of 8 CPUs: those of the performance cores (by cpu_capacity)"),
    ),
    "compact cores beside full ones, told by their top frequency": Described(
        mask="0-23",
        files={
            **siblings(*(f"{cpu},{cpu + 12}" for cpu in range(12))),
            **each("cpufreq/cpuinfo_max_freq", ([5_157_000] * 4 + [3_300_000] * 8) * 2),
        },
        generation=(
            4,
            "4 of 24 CPUs: one per performance core, 8 slower cores would hold up each step (by top frequency)",
        ),
        prompt=(8, "8 of 24 CPUs: those of the performance cores (by top frequency)"),
    ),
    "favoured cores that boost a little higher are no other kind": Described(
        mask="0-7",
        files=each("cpufreq/cpuinfo_max_freq", [5_800_000] * 2 + [5_500_000] * 6),
        generation=(8, "all 8 CPUs that we may use"),
        prompt=(8, "all 8 CPUs that we may use"),
    ),
    "Kubernetes: 1.5 CPUs on a host of 64": Described(
        mask="0-63",
        files={
            "proc/self/cgroup": "0::/kubepods/burstable/pod1/c1",
            "sys/fs/cgroup/kubepods/burstable/pod1/c1/cpu.max": "max 100000",
            "sys/fs/cgroup/kubepods/burstable/pod1/cpu.max": "150000 100000",
        },
        generation=(1, "1 of 64 CPUs: cgroup quota 1.5"),
        prompt=(1, "1 of 64 CPUs: cgroup quota 1.5"),
    ),
    "half a CPU, seen from within a cgroup namespace": Described(
        mask="0-7",
        files={"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"},
        generation=(1, "1 of 8 CPUs: cgroup quota 0.5"),
        prompt=(1, "1 of 8 CPUs: cgroup quota 0.5"),
    ),
    "docker with cgroup v1": Described(
        mask="0-63",
        files=DOCKER_V1,
        generation=(2, "2 of 64 CPUs: cgroup quota 2.0"),
        prompt=(2, "2 of 64 CPUs: cgroup quota 2.0"),
    ),
    "a hybrid hierarchy: the quota is in v1, v2 has its own folder": Described(
        mask="0-7",
        files={
            "proc/self/cgroup": "1:cpu:/job\n0::/job",
            "proc/self/mountinfo": (
                "30 23 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
                "31 23 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
            ),
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "325000",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/unified/job/cpu.stat": "usage_usec 1",
        },
        generation=(3, "3 of 8 CPUs: cgroup quota 3.25"),
        prompt=(3, "3 of 8 CPUs: cgroup quota 3.25"),
    ),
    "no limit at all in v1 (-1) and v2 (max)": Described(
        mask="0-63",
        files={
            "proc/self/cgroup": "1:cpu:/\n0::/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu.max": "max 100000",
        },
        generation=(64, ALL_64),
        prompt=(64, ALL_64),
    ),
    "taskset -c 0": Described(
        mask="0",
        files=EPYC,
        generation=(1, "the one CPU that we may use"),
        prompt=(1, "the one CPU that we may use"),
    ),
    "a mask with half of a core in it": Described(
        mask="0-2",
        files=siblings("0-1", "2-3"),
        generation=(2, "2 of 3 CPUs: one per physical core"),
        prompt=(3, "all 3 CPUs that we may use"),
    ),
    "a quota between cores and CPUs limits the prompt alone": Described(
        mask="0-3",
        files={**siblings("0-1", "2-3"), "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "300000 100000"},
        generation=(2, "2 of 4 CPUs: one per physical core"),
        prompt=(3, "3 of 4 CPUs: cgroup quota 3.0"),
    ),
    "a virtual machine without topology files": Described(
        mask="0-5",
        generation=(6, "all 6 CPUs that we may use"),
        prompt=(6, "all 6 CPUs that we may use"),
    ),
    "a virtual machine whose mask names CPUs that it does not have": Described(
        mask="0-127",
        files={f"{CPU}/online": "0-3", **siblings("0", "1", "2", "3")},
        generation=(4, "all 4 CPUs that we may use"),
        prompt=(4, "all 4 CPUs that we may use"),
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_threads_of_a_described_machine(name: str, tmp_path: Path) -> None:
    told = MACHINES[name]
    lay_out(tmp_path, {"proc/self/status": f"Name:\tx\nCpus_allowed_list:\t{told.mask}", **told.files})
    found = read_cpus(tmp_path)
    threads = found.generation_threads, found.prompt_threads
    assert tuple((each.count, each.reason) for each in threads) == (told.generation, told.prompt)


def test_a_container_is_found_below_the_group_that_its_mount_shows(tmp_path: Path) -> None:
    """Without a cgroup namespace the path is the host's, and the mount begins at our group."""
    root = lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/abc/inner",
            "proc/self/mountinfo": "40 23 0:30 /docker/abc /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate",
            "sys/fs/cgroup/inner/cpu.max": "max 100000",
            "sys/fs/cgroup/docker/abc/cpu.max": "100000 100000",  # a group of the container's own, and not ours
            "sys/fs/cgroup/cpu.max": "250000 100000",
        },
    )
    top = root / "sys/fs/cgroup"
    assert cgroup_folders(root, "cpu") == [(2, top / "inner"), (2, top)]
    assert read_cpus(root).quota == 2.5


def test_a_group_outside_of_the_namespace_counts_as_the_top(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/../other", "sys/fs/cgroup/cpu.max": "100000 50000"})
    (root / "sys/fs/other").mkdir()
    (root / "sys/fs/other/cpu.max").write_text("1 1000")
    assert read_cpus(root).quota == 2.0


@pytest.mark.parametrize("text", ["", "garbage", "100000", "max", "-1 100000", "100000 0"])
def test_a_quota_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": text})
    assert read_cpus(root).quota is None


def test_a_cpuset_narrows_the_mask_and_nothing_else_is_needed(tmp_path: Path) -> None:
    """The kernel keeps Cpus_allowed_list within cpuset.cpus; the group's own file is not asked."""
    root = lay_out(
        tmp_path,
        {
            "proc/self/status": "Cpus_allowed_list:\t4-5",
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/cpuset.cpus.effective": "4-5",
            **nodes("0-3", "4-7"),
        },
    )
    assert read_cpus(root) == Cpus(cpus=2, cores=2, quota=None, node_cores=(2,))


@pytest.mark.skipif(sys.platform != "linux", reason="reads this machine's own files")
def test_this_machine_has_cpus() -> None:
    found = read_cpus()
    assert 1 <= found.generation_threads.count <= found.prompt_threads.count <= found.cpus
