"""Does a wheel compute? Asked of the library that ``import llama_cpp`` really loads, in a child."""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, files
from toolchain.base.errors import ArtifactError, FoundryError


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


def require_backends(proof: Proof, promised: Mapping[str, str]) -> None:
    """Raise ArtifactError when a backend that was promised (by which name, ``--rpc``: ``RPC``) did not register."""
    for promise, backend in promised.items():
        if backend not in proof.backends:
            raise ArtifactError(
                f"{promise} was promised, but the library has no {backend} backend",
                evidence="\n".join((f"it has: {', '.join(proof.backends)}", *proof.told)),
                hint="of an own build, read the log for what cmake left out; of a wheel, take another",
            )
