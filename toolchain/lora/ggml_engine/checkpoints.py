"""The trainer's checkpoints: which one a run goes on from, and which ones stay.

The trainer writes each in place, in one go from front to end, and looks at no error. One counts when the file has the
size that its header asks for and the loss curve reaches its step. They are named by their steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from toolchain.base import files
from toolchain.base.errors import ArtifactError, FoundryError
from toolchain.base.gguf import read_header
from toolchain.lora.spec import CHECKPOINTS, METRICS

KEPT: Final = 2


def resume(run_dir: Path, steps: int) -> int:
    """The step of the newest whole checkpoint that the loss curve reaches, else 0; what lies beyond it is removed."""
    folder, metrics = run_dir / CHECKPOINTS, run_dir / METRICS
    curve = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    whole = [line for number, line in enumerate(curve, 1) if line.startswith(f'{{"step": {number},')]
    reached = [line for line in whole if line.endswith("}\n")]
    usable = [step for step in _saved(folder) if step <= min(len(reached), steps) and _is_whole(folder / str(step))]
    start = max(usable, default=0)
    for step in _saved(folder):
        if step not in usable:
            files.remove(folder / str(step), within=folder)
    if len(curve) != start:
        with files.staged(metrics) as partial:
            partial.write_text("".join(reached[:start]))
    return start


def keep(folder: Path, step: int, *, curve: IO[str]) -> None:
    """Bring the checkpoint of ``step`` to disk, with the loss curve that reaches it; of those up to it KEPT stay.

    The trainer may be ahead of its own lines: what is newer stays too. MissingError where the disk was too full for it.
    """
    path = folder / str(step)
    look_at(lambda: _read_checkpoint(path), path)
    os.fsync(curve.fileno())
    files.promote(path, path)
    for old in [saved for saved in _saved(folder) if saved <= step][:-KEPT]:
        files.remove(folder / str(old), within=folder)


def look_at(look: Callable[[], object], path: Path) -> None:
    """``look`` at what the trainer wrote; MissingError where it is cut because the disk is full."""
    try:
        look()
    except FoundryError as error:
        full = files.is_full(path)
        files.remove(path, within=path.parent)
        raise (files.disk_full(path, error.evidence) if full else error) from error


def _saved(folder: Path) -> list[int]:
    """Steps that a checkpoint is there of, in order, whole or not."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _is_whole(path: Path) -> bool:
    try:
        _read_checkpoint(path)
    except FoundryError:
        return False
    return True


def _read_checkpoint(path: Path) -> None:
    """Raise ArtifactError unless all of it is there, the zeros behind the last tensor too: the trainer reads them."""
    header = read_header(path)
    end = max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    wanted = header.data_offset + -(-end // header.alignment) * header.alignment
    if not header.tensors or header.file_bytes < wanted:
        raise ArtifactError(f"checkpoint {path.name} is cut", evidence=f"{header.file_bytes} of {wanted} bytes")
