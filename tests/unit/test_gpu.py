"""GPUs and driver as NVML tells them, through a real library that describes a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.described_nvml import write_nvml
from tests.front_door import ROOT, environment
from toolchain.base.command import _environment
from toolchain.base.gpu import Gpu, probe_gpus, visible

SMALL = Gpu(name="NVIDIA GeForce RTX 3060", memory_bytes=12 << 30, capability=(8, 6), uuid="GPU-aa11")
LARGE = Gpu(name="NVIDIA H200", memory_bytes=141 << 30, capability=(9, 0), uuid="GPU-bb22")
ASK = """
import dataclasses, json
from toolchain.base.gpu import probe_gpus
gpus, driver = probe_gpus()
print(json.dumps([[dataclasses.asdict(gpu) for gpu in gpus], driver and dataclasses.asdict(driver)]))
"""


def asked(env: dict[str, str]) -> tuple[list[dict[str, object]], dict[str, object] | None]:
    """(GPUs, driver) that a fresh process sees."""
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, env=environment(env), capture_output=True, text=True, check=True
    )
    gpus, driver = json.loads(done.stdout)
    return gpus, driver


def described(env: dict[str, str]) -> list[dict[str, object]]:
    return asked(env)[0]


def seen(env: dict[str, str]) -> tuple[list[object], dict[str, object] | None]:
    """(names, driver) that a fresh process sees."""
    gpus, driver = asked(env)
    return [gpu["name"] for gpu in gpus], driver


def test_gpus_and_driver_are_told_by_nvml(tmp_path: Path) -> None:
    env = write_nvml(tmp_path, [SMALL, LARGE], driver="580.65.06", cuda=(13, 0))
    names, driver = seen(env)
    assert names == [SMALL.name, LARGE.name]
    assert driver == {"version": "580.65.06", "cuda": [13, 0]}
    assert seen({**env, "CUDA_VISIBLE_DEVICES": ""})[0] == []
    assert seen({**env, "CUDA_VISIBLE_DEVICES": "GPU-bb"})[0] == [LARGE.name]


def test_free_memory_and_peaks_are_told_by_nvml(tmp_path: Path) -> None:
    card = replace(SMALL, free_bytes=11 << 30, bandwidth_bytes_s=360e9, flops=12.8e12)
    (told,) = described(write_nvml(tmp_path, [card]))
    assert (told["memory_bytes"], told["free_bytes"], told["shares_memory"]) == (12 << 30, 11 << 30, False)
    assert (told["bandwidth_bytes_s"], told["flops"]) == (360e9, 12.8e12)


def test_a_gpu_without_memory_of_its_own_shares_the_machines(tmp_path: Path) -> None:
    (told,) = described(write_nvml(tmp_path, [Gpu(name="Orin", capability=(8, 7), shares_memory=True)]))
    assert (told["memory_bytes"], told["shares_memory"], told["bandwidth_bytes_s"]) == (0, True, 0.0)


def test_a_driver_that_does_not_answer_is_no_driver(tmp_path: Path) -> None:
    assert seen(write_nvml(tmp_path, [SMALL], answers=False)) == ([], None)


def test_without_nvml_the_kernel_tells_the_names(tmp_path: Path) -> None:
    folder = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA GeForce RTX 3060\nIRQ: 1\n")
    gpus, driver = probe_gpus(tmp_path)
    assert ([str(gpu) for gpu in gpus], driver) == (["NVIDIA GeForce RTX 3060"], None)


@pytest.mark.parametrize(
    ("wanted", "order", "left"),
    [
        (None, None, (SMALL, LARGE)),
        ("", None, ()),
        ("-1", None, ()),
        ("1", "PCI_BUS_ID", (LARGE,)),
        ("1,0", "PCI_BUS_ID", (LARGE, SMALL)),
        ("GPU-bb22,0", None, (LARGE, SMALL)),
        ("0,7,1", "PCI_BUS_ID", (SMALL,)),
        ("GPU-aa11", None, (SMALL,)),
        ("1", None, (LARGE,)),  # the library is loaded with the order of NVML
        ("1", "FASTEST_FIRST", (SMALL, LARGE)),  # unequal GPUs by speed: either may be meant
    ],
)
def test_what_cuda_visible_devices_leaves(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, order: str | None, left: tuple[Gpu, ...]
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert visible((SMALL, LARGE), wanted) == left


def test_a_slice_of_a_gpu_is_no_whole_gpu() -> None:
    assert [gpu.memory_bytes for gpu in visible((SMALL, LARGE), "MIG-11aa")] == [0, 0]


def test_a_child_counts_gpus_as_nvml_does_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert _environment({})["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert _environment({})["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
