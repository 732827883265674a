"""Is the GPU's code in a library, does it serve the visible GPUs, and did layers really run there?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from toolchain.base.errors import ArtifactError
from toolchain.base.gpu import Gpu
from toolchain.build.cuda import CudaChoice
from toolchain.build.fatbin import DeviceCode, device_code, find_cuobjdump, serves
from toolchain.build.proof import Proof

ELSEWHERE = ("libggml.so", "libggml_shared.so", "libllama.so", "finetune")
"""Where trees of before December 2024 have their CUDA code, when not in a library of its own."""
HOST_BACKENDS = frozenset({"CPU", "BLAS", "RPC"})


def prove_cuda(root: Path, choice: CudaChoice) -> tuple[DeviceCode, ...]:
    """The device code below ``root``; ArtifactError when an architecture that was asked for is not in it."""
    codes = embedded(root, choice.toolkit.root / "bin" if choice.toolkit else None)
    there = {(code.kind, code.arch.rstrip("af")) for code in codes}  # llama.cpp compiles 120 as 120a
    missing = [code for code in choice.wanted if (code.kind, code.arch.rstrip("af")) not in there]
    if missing:
        raise ArtifactError(
            f"the CUDA library lacks {_shown(missing)}, which was asked for",
            evidence=f"it carries {_shown(codes) or 'no device code'}",
            hint="read the build's log for what cmake did with CMAKE_CUDA_ARCHITECTURES",
        )
    return codes


def embedded(root: Path, toolkit_bin: Path | None = None) -> tuple[DeviceCode, ...]:
    """The device code below ``root`` (a Toolchain, or the libraries of a package); empty for a build without CUDA."""
    cuobjdump = find_cuobjdump(toolkit_bin) if toolkit_bin else None
    if own := sorted(root.rglob("libggml-cuda.so")):
        return device_code(own[0], cuobjdump=cuobjdump)
    if any(root.rglob("libggml-base.*")):
        return ()
    for library in (path for name in ELSEWHERE for path in sorted(root.rglob(name))):
        try:
            return device_code(library, cuobjdump=cuobjdump)
        except ArtifactError:  # none in it
            continue
    return ()


def require_served(codes: Sequence[DeviceCode], gpus: Sequence[Gpu]) -> None:
    """Raise ArtifactError when CUDA code is there, but none that any visible GPU can run.

    Of several GPUs some may be left out: the solver has said which.
    """
    able = [gpu for gpu in gpus if gpu.capability]
    if codes and able and not any(serves(codes, gpu.capability) for gpu in able if gpu.capability):
        raise ArtifactError(
            f"this build cannot run on the visible {', '.join(map(str, able))}",
            evidence=f"it carries {_shown(codes)}",
            hint=f"build for it: `./inv build --cuda --cuda-arch {able[0].arch}`",
        )


def judge_execution(
    proof: Proof, codes: Sequence[DeviceCode], gpus: Sequence[Gpu]
) -> tuple[dict[str, object] | None, str]:
    """(devices and layers that ran on an accelerator, or None; the reason in words).

    ``codes`` is empty for a build without CUDA. Raises ArtifactError when a GPU that the driver shows is not served,
    or when the library put less than all layers of the proof's model on it.
    """
    ran: dict[str, object] = {"devices": list(proof.devices), "layers": proof.layers[0], "of": proof.layers[1]}
    told = f"{proof.layers[0]} of {proof.layers[1]} layers ran on {', '.join(proof.devices) or 'the GPU'}"
    if not codes:
        others = [backend for backend in proof.backends if backend not in HOST_BACKENDS]
        if proof.devices and proof.layers[0]:
            return ran, told
        return None, f"no device for {', '.join(others)} here" if others else "a CPU build"
    able = [gpu for gpu in gpus if gpu.capability]
    if not able:
        return None, "the driver does not answer for the GPU here" if gpus else "no GPU visible"
    require_served(codes, able)
    # trees of before December 2024 name no devices in their log: there the layers alone tell
    on_cuda = not proof.devices or any(re.match(r"CUDA\d", device) for device in proof.devices)
    if not (on_cuda and proof.layers[0] == proof.layers[1] > 0):
        raise ArtifactError(
            f"{able[0]} is visible, but {told}",
            evidence="\n".join(proof.told) or "the library says nothing of devices",
            hint="run `nvidia-smi`: driver and GPU must answer; then `./inv doctor`",
        )
    return ran, told


def architecture_names(codes: Sequence[DeviceCode]) -> tuple[str, ...]:
    """As nvcc names them: ``sm_90`` for machine code, ``compute_90`` for PTX."""
    return tuple(f"{'sm' if code.kind == 'sass' else 'compute'}_{code.arch}" for code in codes)


def _shown(codes: Sequence[DeviceCode]) -> str:
    return ", ".join(architecture_names(codes))
