"""The fat binary reader against what nvcc writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from toolchain.build.fatbin import device_code, find_cuobjdump

KERNEL = """
__global__ void twice(float * x) { x[threadIdx.x] *= 2.0f; }
extern "C" void launch(float * x) { twice<<<1, 32>>>(x); }
"""


@pytest.fixture(scope="module")
def nvcc() -> Path:
    for place in (None, "/usr/local/cuda/bin"):
        if found := shutil.which("nvcc", path=place):
            return Path(found)
    pytest.skip("no nvcc on PATH or in /usr/local/cuda/bin")


@pytest.mark.parametrize("compression", [[], ["-Xfatbin", "-compress-all"]], ids=["default", "compressed"])
def test_what_nvcc_was_asked_for_is_what_is_found(nvcc: Path, tmp_path: Path, compression: list[str]) -> None:
    source, library = tmp_path / "twice.cu", tmp_path / "libtwice.so"
    source.write_text(KERNEL)
    wanted = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=[sm_90a,compute_90a]"]
    argv: list[str | Path] = [nvcc, "-shared", "-Xcompiler", "-fPIC", *wanted, *compression, source, "-o", library]
    subprocess.run(argv, check=True, capture_output=True, cwd=tmp_path)
    read = device_code(library)
    assert [(code.kind, code.arch) for code in read] == [("sass", "80"), ("ptx", "90a"), ("sass", "90a")]
    if cuobjdump := find_cuobjdump(nvcc.parent):
        assert device_code(library, cuobjdump=cuobjdump) == read
