"""What counts as a proof that a build runs on the GPU, on described findings of the child that ran it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.described_fatbin import elf, entry, fatbin
from toolchain.base.errors import ArtifactError
from toolchain.base.gpu import Gpu
from toolchain.build.fatbin import DeviceCode
from toolchain.build.gpu_proof import embedded, judge_execution, require_served
from toolchain.build.proof import Proof, require_backends

RTX_3060 = Gpu(name="NVIDIA GeForce RTX 3060", capability=(8, 6))
H200 = Gpu(name="NVIDIA H200", capability=(9, 0))
KERNEL_ONLY = Gpu(name="NVIDIA T4")
SM_86 = (DeviceCode(arch="86", kind="sass"),)


def found(
    *, devices: tuple[str, ...] = (), layers: tuple[int, int] = (0, 0), backends: tuple[str, ...] = ("CPU",)
) -> Proof:
    return Proof(
        version="1", commit="c", backends=backends, library="libllama.so", devices=devices, layers=layers,
        told=("ggml_cuda_init: failed to initialize CUDA: no kernel image",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("proof", "gpus", "executed", "reason"),
    [
        (found(devices=("CUDA0",), layers=(2, 2)), (RTX_3060,), 2, "2 of 2 layers ran on CUDA0"),
        (found(layers=(2, 2)), (RTX_3060,), 2, "2 of 2 layers ran on the GPU"),  # trees that name no devices
        (found(), (), None, "no GPU visible"),
        (found(), (KERNEL_ONLY,), None, "the driver does not answer for the GPU here"),
        (found(devices=("CUDA0",), layers=(2, 2)), (RTX_3060, H200), 2, "2 of 2 layers ran on CUDA0"),
    ],
)
def test_a_cuda_build_is_judged_by_its_layers(
    proof: Proof, gpus: tuple[Gpu, ...], executed: int | None, reason: str
) -> None:
    ran, told = judge_execution(proof, SM_86, gpus)
    assert (ran["layers"] if ran else None, told) == (executed, reason)


@pytest.mark.parametrize(
    ("proof", "gpus", "words"),
    [
        (found(), (RTX_3060,), "0 of 0 layers ran"),
        (found(devices=("CUDA0",), layers=(1, 2)), (RTX_3060,), "1 of 2 layers ran"),
        (found(devices=("Vulkan0",), layers=(2, 2)), (RTX_3060,), "layers ran on Vulkan0"),
        (found(devices=("CUDA0",), layers=(2, 2)), (H200,), "cannot run on the visible NVIDIA H200 (sm_90)"),
    ],
)
def test_a_visible_gpu_that_is_not_used_is_an_error(proof: Proof, gpus: tuple[Gpu, ...], words: str) -> None:
    with pytest.raises(ArtifactError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
        judge_execution(proof, SM_86, gpus)
    assert caught.value.evidence


@pytest.mark.parametrize(
    ("proof", "executed", "reason"),
    [
        (found(), None, "a CPU build"),
        (found(backends=("BLAS", "CPU")), None, "a CPU build"),
        (found(backends=("Vulkan", "CPU")), None, "no device for Vulkan here"),
        (found(devices=("Metal",), layers=(1, 2), backends=("Metal", "CPU")), 1, "1 of 2 layers ran on Metal"),
    ],
)
def test_other_builds_say_what_ran(proof: Proof, executed: int | None, reason: str) -> None:
    ran, told = judge_execution(proof, (), (RTX_3060,))
    assert (ran["layers"] if ran else None, told) == (executed, reason)


def test_one_served_gpu_of_two_is_enough() -> None:
    require_served(SM_86, (H200, RTX_3060))
    with pytest.raises(ArtifactError, match="cannot run"):
        require_served(SM_86, (H200,))


def test_a_promised_backend_that_did_not_register_is_an_error() -> None:
    require_backends(found(backends=("CUDA", "CPU")), {"--cuda": "CUDA"})
    with pytest.raises(ArtifactError, match="--cuda was promised, but the library has no CUDA backend"):
        require_backends(found(backends=("BLAS", "CPU")), {"--cuda": "CUDA"})


@pytest.mark.parametrize(
    "name", ["lib/libggml-cuda.so", "bin/libggml-cuda.so", "lib/libggml.so", "lib/libllama.so", "bin/finetune"]
)
def test_device_code_is_found_where_trees_of_each_year_have_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(elf((".nv_fatbin", fatbin(entry(2, 86)))))
    if name != "lib/libllama.so":
        (path.parent / "libllama.so").write_bytes(elf((".text", b"\xc3")))
    assert embedded(tmp_path) == SM_86


def test_a_build_without_cuda_has_none(tmp_path: Path) -> None:
    for name in ("libggml-base.so", "libllama.so"):
        (tmp_path / name).write_bytes(elf((".text", b"\xc3")))
    assert embedded(tmp_path) == ()
