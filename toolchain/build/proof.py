"""Does a build hold what it promises? Its wheel computes, its CUDA code is there, and a visible GPU really runs it."""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, files
from toolchain.base.errors import ArtifactError, FoundryError
from toolchain.base.gpu import Gpu
from toolchain.build.cuda import CudaChoice
from toolchain.build.fatbin import DeviceCode, device_code, find_cuobjdump, serves
from toolchain.build.variants import Variant


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a child found in the library that ``import llama_cpp`` really loads.

    ``devices`` are the accelerators that the model was put on, ``layers`` how many of its layers and of how many;
    ``told`` are lines of the library's log that speak of devices.
    """

    version: str
    commit: str
    backends: tuple[str, ...]
    library: str
    devices: tuple[str, ...]
    layers: tuple[int, int]
    told: tuple[str, ...]

    @property
    def executed(self) -> dict[str, object] | None:
        """Where layers ran beside the CPU: None when nowhere."""
        if not self.devices or not self.layers[0]:
            return None
        return {"devices": list(self.devices), "layers": self.layers[0], "of": self.layers[1]}


def prove_wheel(wheel: Path, *, commit: str, env: Mapping[str, str | None] | None = None) -> Proof:
    """Unpack ``wheel`` somewhere else and prove it there; raises ArtifactError when it does not hold."""
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="proof-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        return prove(commit=commit, path=Path(scratch), env=env)


def prove(*, commit: str | None, path: Path | None = None, env: Mapping[str, str | None] | None = None) -> Proof:
    """Import llama_cpp in a child (from ``path``, else as installed) and make it compute; ``env`` is added to its own.

    Raises ArtifactError when it does not load, is of another commit (None: any will do), or computes wrong numbers.
    """
    child = Path(__file__).with_name("prove_child.py")
    environment = {"PYTHONPATH": str(path) if path else None, "LLAMA_CPP_LIB_PATH": None, **(env or {})}
    try:
        output = command.run([sys.executable, child], what="proving the bindings", env=environment).output
        found = json.loads(output.splitlines()[-1])
    except (FoundryError, ValueError, IndexError) as error:
        evidence = error.evidence if isinstance(error, FoundryError) else str(error)
        raise ArtifactError(
            "the Python bindings do not work with the libraries of this build",
            evidence=evidence,
            hint="the bindings must match llama.cpp's commit: build the default source, or a pin of llama-cpp-python",
        ) from error
    loaded = found["commit"].split("-")[0]  # older trees add -dirty outside a repository
    if commit and loaded and loaded != commit:
        raise ArtifactError(
            "the bindings load another llama.cpp than the one just built",
            evidence=f"built {commit}, loaded {found['commit']} from {found['library']}",
            hint="unset LD_LIBRARY_PATH and LD_PRELOAD, then run `./inv build` again",
        )
    return Proof(
        version=found["version"],
        commit=found["commit"],
        backends=tuple(found["backends"]),
        library=found["library"],
        devices=tuple(found["devices"]),
        layers=(int(found["layers"][0]), int(found["layers"][1])),
        told=tuple(found["told"]),
    )


def require_backends(proof: Proof, variants: Sequence[Variant]) -> None:
    """Raise ArtifactError when a chosen variant's backend did not register with the library."""
    for variant in variants:
        if variant.backend and variant.backend not in proof.backends:
            raise ArtifactError(
                f"{variant.flag} was built, but the library has no {variant.backend} backend",
                evidence="\n".join((f"it has: {', '.join(proof.backends)}", *proof.told)),
                hint="read the build's log for what cmake left out",
            )


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
    """The device code below ``root`` (a Toolchain, or the libraries of a package); empty for a build without CUDA.

    Today's builds have it in a library of its own, those of before mid-2024 in libllama or in each program.
    """
    cuobjdump = find_cuobjdump(toolkit_bin) if toolkit_bin else None
    for library in sorted(root.rglob("libggml-cuda.so")):
        return device_code(library, cuobjdump=cuobjdump)
    if not any(root.rglob("libggml-base.*")):
        for library in (*sorted(root.rglob("libllama.so")), *sorted(root.rglob("finetune"))):
            try:
                return device_code(library, cuobjdump=cuobjdump)
            except ArtifactError:  # none in it
                continue
    return ()


def require_served(codes: Sequence[DeviceCode], gpus: Sequence[Gpu]) -> None:
    """Raise ArtifactError when CUDA code is there, but none that a visible GPU can run."""
    for gpu in gpus if codes else ():
        if gpu.capability and serves(codes, gpu.capability) is None:
            raise ArtifactError(
                f"this build cannot run on the visible {gpu}",
                evidence=f"it carries {_shown(codes)}",
                hint=f"build for it: `./inv build --cuda --cuda-arch {gpu.arch}`",
            )


def judge_execution(
    proof: Proof, codes: Sequence[DeviceCode], gpus: Sequence[Gpu]
) -> tuple[dict[str, object] | None, str]:
    """(what ran on a GPU, or None; the reason in words). ArtifactError when a visible GPU is not served.

    ``codes`` is empty for a build without CUDA.
    """
    if not codes:
        return proof.executed, "a CPU build" if proof.executed is None else "all layers ran on the accelerator"
    if not gpus:
        return None, "no GPU visible"
    require_served(codes, gpus)
    if proof.executed is None:
        raise ArtifactError(
            f"{gpus[0]} is visible, but the library put no layer on it",
            evidence="\n".join(proof.told) or "the library says nothing of devices",
            hint="run `nvidia-smi`: driver and GPU must answer; then `./inv doctor`",
        )
    return proof.executed, f"{proof.layers[0]} of {proof.layers[1]} layers ran on {', '.join(proof.devices)}"


def architecture_names(codes: Sequence[DeviceCode]) -> tuple[str, ...]:
    """As nvcc names them: ``sm_90`` for machine code, ``compute_90`` for PTX."""
    return tuple(f"{'sm' if code.kind == 'sass' else 'compute'}_{code.arch}" for code in codes)


def _shown(codes: Sequence[DeviceCode]) -> str:
    return ", ".join(architecture_names(codes))
