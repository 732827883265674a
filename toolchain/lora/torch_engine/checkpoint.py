"""Where a training can go on from, bit for bit.

A checkpoint is a folder that appears by one rename, its ``done.json`` with the hashes of the others written last. It
holds what the next step depends on: the adapter and the optimizer's state. Generators are seeded anew for each step
(``loop``), from the step's number, so they have no state to keep. No pickle: whatever is read is only numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from toolchain.base import files

KEPT: Final = 2
"""Where the last one turns out to be broken, there is one before it."""
_DONE: Final = "done.json"
_ADAPTER: Final = "adapter.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What the run knows at a checkpoint beside its tensors. ``seconds`` and ``tokens`` are of the timed steps."""

    step: int
    timed_steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    held_out_before: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    counted: Counted
    adapter: Tensors
    optimizer: Tensors


def save_checkpoint(
    folder: Path,
    counted: Counted,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    identity: str,
) -> None:
    """Write ``folder/step-N``, whole and on disk, then take away all but the last two.

    ``identity`` tells this training from others. MissingError where the disk is full; older checkpoints then stay.
    """
    final = folder / f"step-{counted.step:08}"
    with files.staging(final) as partial:
        partial.mkdir()
        adapter = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
        parts = {_ADAPTER: save(adapter), _OPTIMIZER: save(_state_tensors(parameters, optimizer))}
        for name, data in parts.items():
            _write(partial / name, data)
        hashes = {name: files.sha256_file(partial / name) for name in parts}
        done = {"identity": identity, "sha256": hashes, "counted": asdict(counted)}
        _write(partial / _DONE, json.dumps(done, indent=2).encode())
        if final.exists():  # left by a run that went on from an earlier one
            files.remove(final, within=folder)
        partial.replace(final)
        _fsync(folder)
    for old in _steps(folder)[:-KEPT]:
        files.remove(old, within=folder)


def last_checkpoint(folder: Path, *, identity: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last whole checkpoint of the training ``identity`` in ``folder``; ``warn`` is told what is passed over."""
    for path in reversed(_steps(folder)):
        try:
            return _read(path, identity)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warn(f"the checkpoint {path.name} is passed over: {error}")
    return None


def restore(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put parameters and optimizer back to where they were."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.adapter[name])
    state: dict[int, Tensors] = {}
    numbers = {name: number for number, name in enumerate(parameters)}
    for key, tensor in checkpoint.optimizer.items():
        kind, _, name = key.partition(":")
        state.setdefault(numbers[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _state_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as ``kind:parameter``; it numbers parameters in the order in which it got them."""
    state = optimizer.state_dict()["state"]
    names = list(parameters)
    return {
        f"{kind}:{names[number]}": value.detach().cpu().contiguous()
        for number, kinds in state.items()
        for kind, value in kinds.items()
    }


def _read(path: Path, identity: str) -> Checkpoint:
    match files.read_json(path / _DONE):
        case {"identity": str(found), "sha256": dict(hashes), "counted": dict(counted)}:
            pass
        case _:
            raise ValueError("it was never finished")
    if found != identity:
        raise ValueError("it is of another training")
    for name, expected in hashes.items():
        if files.sha256_file(path / name) != expected:
            raise ValueError(f"{name} is not what was written")
    return Checkpoint(
        counted=Counted(**counted), adapter=_tensors(path / _ADAPTER), optimizer=_tensors(path / _OPTIMIZER)
    )


def _tensors(path: Path) -> Tensors:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _write(path: Path, data: bytes) -> None:
    """By our own hands: safetensors' writer reports a full disk as an error of its own kind."""
    with path.open("wb") as sink:
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
