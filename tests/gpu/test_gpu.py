"""On a machine with an NVIDIA GPU: what `inv build --cuda` makes really runs there.

Asked for by name, this tier fails where there is no GPU; it never passes by skipping.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.front_door import ROOT, inv, inv_json
from toolchain.base.machine import probe
from toolchain.build.fatbin import DeviceCode, serves
from toolchain.build.toolchain import current


@pytest.fixture(scope="session")
def cuda() -> Iterator[dict[str, Any]]:
    """What `inv build --cuda --json` answers for the visible GPUs; it is in use until the tests have ended."""
    assert probe().gpus, "no NVIDIA GPU is visible to this process"
    before = current()
    yield inv_json("build", "--cuda")
    if before:
        inv("use", before.id)


def test_the_driver_tells_gpus_and_what_it_runs() -> None:
    machine = probe()
    assert machine.gpus, "no NVIDIA GPU is visible to this process"
    assert machine.driver is not None
    assert all(gpu.capability and gpu.memory_bytes for gpu in machine.gpus)


def test_the_build_carries_code_for_the_visible_gpus_and_ran_on_one(cuda: dict[str, Any]) -> None:
    codes = [
        DeviceCode(arch=name.partition("_")[2], kind="sass" if name.startswith("sm_") else "ptx")
        for name in cuda["architectures"]
    ]
    for gpu in probe().gpus:
        assert gpu.capability is not None
        assert serves(codes, gpu.capability)
    assert "CUDA" in cuda["backends"]
    assert cuda["executed"] is not None, cuda["reason"]
    assert cuda["executed"]["layers"] == cuda["executed"]["of"] > 0


def test_the_doctor_finds_nothing_bad(cuda: dict[str, Any]) -> None:
    told = inv_json("doctor")
    assert told["healthy"] is True
    assert not [one for one in told["findings"] if "falls back to the CPU" in one["finding"]]


def test_a_hidden_gpu_is_said(cuda: dict[str, Any]) -> None:
    told = inv_json("doctor", env={"CUDA_VISIBLE_DEVICES": ""})
    assert any("falls back to the CPU" in one["finding"] for one in told["findings"])


def test_all_layers_are_on_the_gpu_and_text_comes_out(cuda: dict[str, Any], demo_gguf: Path) -> None:
    inv("use", cuda["toolchain_id"])
    argv = [sys.executable, "-m", "runtime", "complete", demo_gguf, "-p", "The", "-n", "16", "--verbose"]
    done = subprocess.run([*argv, "--n-gpu-layers", "all"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", done.stderr)
    assert offloaded, done.stderr[-2000:]
    assert offloaded[1] == offloaded[2]


def test_the_library_counts_gpus_as_nvml_does(cuda: dict[str, Any]) -> None:
    inv("use", cuda["toolchain_id"])
    ask = (
        "import json\n"
        "from runtime.memory.library_devices import library_gpus\n"
        "from toolchain.base.machine import probe\n"
        "print(json.dumps([[gpu.name for gpu in library_gpus()], [gpu.name for gpu in probe().gpus]]))"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    told, known = json.loads(done.stdout.splitlines()[-1])
    assert told == known
