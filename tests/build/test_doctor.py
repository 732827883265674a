"""`inv doctor`: what is right is said to be right, and each planted trouble is found with its mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.described_nvml import write_nvml
from tests.front_door import inv, inv_json
from toolchain.base.gpu import Gpu
from toolchain.build.toolchain import Toolchain

RTX_3060 = Gpu(name="NVIDIA GeForce RTX 3060", memory_bytes=12 << 30, capability=(8, 6), uuid="GPU-1")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def found(told: dict[str, Any], subject: str) -> dict[str, Any]:
    return next(finding for finding in told["findings"] if finding["subject"] == subject)


@pytest.fixture(scope="module")
def healthy(toolchain: Toolchain) -> dict[str, Any]:
    return inv_json("doctor", env=NO_GPU)


def test_a_sound_build_is_healthy(healthy: dict[str, Any], toolchain: Toolchain) -> None:
    assert healthy["healthy"] is True
    assert healthy["toolchain_id"] == toolchain.id
    assert {finding["state"] for finding in healthy["findings"]} <= {"ok", "note"}


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("toolchain", "backends CPU"),
        ("tools", "0c1e570"),
        ("bindings", "llama_cpp 0.3.36+cpu"),
        ("abi", "constants agree with the library's headers"),
        ("decode", "a decode agrees with its reference"),
    ],
)
def test_each_proof_is_repeated(healthy: dict[str, Any], subject: str, words: str) -> None:
    assert found(healthy, subject)["state"] == "ok"
    assert words in found(healthy, subject)["finding"]


def test_a_gpu_that_the_build_does_not_use_is_noted_with_the_mend(toolchain: Toolchain, tmp_path: Path) -> None:
    told = inv_json("doctor", env=write_nvml(tmp_path, [RTX_3060]))
    assert "RTX 3060 (sm_86)" in found(told, "gpu")["finding"]
    assert "runs CUDA up to 12.4" in found(told, "driver")["finding"]
    assert found(told, "cuda code")["mend"] == "./inv build --cuda"


def test_no_toolchain_is_no_bug(toolchain: Toolchain, tmp_path: Path) -> None:
    """The bindings of another home are installed: they work, and belong to no toolchain of this one."""
    done = inv("doctor", env={**NO_GPU, "FOUNDRY_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    assert "none built yet" in done.stdout
    assert "no toolchain is in use" in done.stdout
    assert "→ ./inv build" in done.stdout


def test_a_damaged_tool_is_found(toolchain: Toolchain, home: Path) -> None:
    """In a home that holds the same toolchain, but for half of a library."""
    place = home / "toolchains" / toolchain.id
    for path in toolchain.root.rglob("*"):
        link = place / path.relative_to(toolchain.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            link.write_bytes(path.read_bytes())
            link.chmod(path.stat().st_mode)
    (home / "toolchains" / "current").symlink_to(toolchain.id)
    library = place / "lib" / "libllama.so"
    library.write_bytes(library.read_bytes()[: 1 << 20])
    done = inv("doctor", env=NO_GPU)
    assert done.returncode == 5, done.stdout
    assert "✗ tools" in done.stdout


def test_variables_that_lead_python_elsewhere_are_noted(toolchain: Toolchain, tmp_path: Path) -> None:
    told = inv_json("doctor", env={**NO_GPU, "LLAMA_CPP_LIB_PATH": str(tmp_path)})
    assert any("LLAMA_CPP_LIB_PATH" in one["finding"] and "unset" in one["mend"] for one in told["findings"])
