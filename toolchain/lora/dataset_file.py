"""The tokens of a training run in one ``.npz``: written by ``data/``, read by the torch engine.

Arrays of both parts, ``train_`` and ``held_``, all (rows, n_ctx) int32:
``ids``        tokens; a row's unused end holds any valid token
``labels``     the token itself where it is learned, IGNORED elsewhere; not shifted: position i is predicted from i-1,
               and the first token of an example is never learned
``positions``  place within the example: 0 begins a new one, which sees nothing before it
And, to compare engine and library before anything is learned:
``probe_ids``  (n,) int32, at most PROBE_TOKENS
``probe_logits`` (n, n_vocab) float32, the library's on them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
PROBE_TOKENS = 32

Tokens = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One part: three arrays (rows, n_ctx)."""

    ids: Tokens
    labels: Tokens
    positions: Tokens

    @property
    def learned(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, kw_only=True)
class Dataset:
    train: Rows
    held: Rows
    probe_ids: Tokens
    probe_logits: NDArray[np.float32]


def write_dataset(path: Path, dataset: Dataset) -> None:
    arrays: dict[str, Any] = {"probe_ids": dataset.probe_ids, "probe_logits": dataset.probe_logits}
    for part, rows in (("train", dataset.train), ("held", dataset.held)):
        arrays |= {f"{part}_{name}": getattr(rows, name) for name in ("ids", "labels", "positions")}
    np.savez(path, **arrays)


def read_dataset(path: Path) -> Dataset:
    with np.load(path, allow_pickle=False) as file:
        parts = {
            part: Rows(**{name: file[f"{part}_{name}"] for name in ("ids", "labels", "positions")})
            for part in ("train", "held")
        }
        return Dataset(**parts, probe_ids=file["probe_ids"], probe_logits=file["probe_logits"])
