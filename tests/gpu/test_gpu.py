"""On a machine with a GPU and a build that uses it (`inv build --define GGML_CUDA=ON`): layers really run there.

Asked for by name, this tier fails where there is no GPU; it never passes by skipping.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.front_door import ROOT
from toolchain.base.machine import probe
from toolchain.build import toolchain


def test_the_kernel_driver_shows_a_gpu() -> None:
    assert probe().gpus, "no NVIDIA GPU: /proc/driver/nvidia/gpus is empty"


def test_the_current_toolchain_has_a_gpu_backend() -> None:
    current = toolchain.current()
    assert current is not None
    assert set(current.backends) - {"CPU", "BLAS"}, f"{current.id} has only {current.backends}"


def test_all_layers_are_on_the_gpu_and_text_comes_out(demo_gguf: Path) -> None:
    argv = [sys.executable, "-m", "runtime", "complete", demo_gguf, "-p", "The", "-n", "16", "--verbose"]
    done = subprocess.run([*argv, "--n-gpu-layers", "all"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", done.stderr)
    assert offloaded, done.stderr[-2000:]
    assert offloaded[1] == offloaded[2]
