"""Machines laid out as files: memory within control groups, and compilers behind wrappers."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.base.machine import find_compiler, probe

GIB = 1 << 30


def lay_out(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {60 * GIB // 1024} kB\n"


def test_file_cache_in_a_cgroup_counts_as_free(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": str(8 * GIB),
            "sys/fs/cgroup/job/memory.current": str(7 * GIB),
            "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {6 * GIB}\n",
        },
    )
    found = probe(root)
    assert (found.ram_bytes, found.available_bytes) == (8 * GIB, 7 * GIB)


def test_the_tightest_remainder_counts_in_nested_v1_groups(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/a/b\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(16 * GIB),
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(15 * GIB),
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": str(8 * GIB),
            "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": str(2 * GIB),
        },
    )
    found = probe(root)
    assert (found.ram_bytes, found.available_bytes) == (8 * GIB, 1 * GIB)


def test_a_compiler_behind_a_wrapper_is_asked_for_its_own_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cc and c++ both lead to one ccache, which runs what it was called as."""
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\necho "$(basename "$0") $(cat "$(dirname "$0")/version")"\n')
    wrapper.chmod(0o755)
    for name in ("cc", "c++"):
        (tmp_path / name).symlink_to(wrapper)
        monkeypatch.setenv({"cc": "CC", "c++": "CXX"}[name], str(tmp_path / name))
    (tmp_path / "version").write_text("12")
    assert (find_compiler("c").version, find_compiler("c++").version) == ("cc 12", "c++ 12")
    (tmp_path / "version").write_text("13")
    assert find_compiler("c").version == "cc 13"
