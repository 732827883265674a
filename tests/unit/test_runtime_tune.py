"""Threads on described machines: each test lays out the files that such a kernel would show."""

from __future__ import annotations

from pathlib import Path

from runtime.tune.threads import tuned_threads
from toolchain.base import machine


def lay_out(root: Path, **files_: str) -> Path:
    for name, content in files_.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def cpus(root: Path, listed: str, *, siblings: dict[int, str] | None = None) -> Path:
    lay_out(root, proc__self__status=f"Name:\tx\nCpus_allowed_list:\t{listed}\n")
    for cpu, shared in (siblings or {}).items():
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(shared)
    return root


def threads(root: Path) -> list[tuple[object, str]]:
    return [(setting.value, setting.reason) for setting in tuned_threads(machine.probe(root))]


def test_cgroup_v1_quota_counts_and_not_the_host(tmp_path: Path) -> None:
    cpus(tmp_path, "0-63")
    lay_out(tmp_path, proc__self__cgroup="4:cpu,cpuacct:/docker/abc\n")
    group = tmp_path / "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("200000")
    (group / "cpu.cfs_period_us").write_text("100000")
    assert threads(tmp_path) == [(2, "2 of 64 CPUs: cgroup quota 2.0")] * 2


def test_tightest_of_nested_cgroup_v2_quotas_counts(tmp_path: Path) -> None:
    cpus(tmp_path, "0-63")
    lay_out(tmp_path, proc__self__cgroup="0::/pod/container\n")
    inner = tmp_path / "sys/fs/cgroup/pod/container"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000")
    (inner.parent / "cpu.max").write_text("350000 100000")
    assert threads(tmp_path) == [(3, "3 of 64 CPUs: cgroup quota 3.5")] * 2


def test_quota_below_one_cpu_still_gives_a_thread(tmp_path: Path) -> None:
    cpus(tmp_path, "0-7")
    lay_out(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__placeholder="")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000")
    assert threads(tmp_path) == [(1, "1 of 8 CPUs: cgroup quota 0.5")] * 2


def test_affinity_mask_counts(tmp_path: Path) -> None:
    cpus(tmp_path, "3")
    assert threads(tmp_path) == [(1, "the one CPU that we may use")] * 2


def test_generation_gets_one_thread_per_physical_core(tmp_path: Path) -> None:
    cpus(tmp_path, "0-3", siblings={0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert threads(tmp_path) == [
        (2, "2 of 4 CPUs: one per physical core"),
        (4, "all 4 CPUs that we may use"),
    ]


def test_quota_between_cores_and_cpus_limits_the_prompt_only(tmp_path: Path) -> None:
    cpus(tmp_path, "0-3", siblings={0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    lay_out(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__placeholder="")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("300000 100000")
    assert threads(tmp_path) == [
        (2, "2 of 4 CPUs: one per physical core"),
        (3, "3 of 4 CPUs: cgroup quota 3.0"),
    ]
