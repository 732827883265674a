"""What a training child is told: one JSON file, written by the run and read by the child.

The children import torch or llama_cpp, the process that starts them does not; this module is the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from toolchain.base import files

METRICS = "metrics.jsonl"
"""The loss curve: one line for each optimizer step, in order; see ``StepLine``."""
CHECKPOINTS = "checkpoints"
"""Folders ``step-00000050``; one without its ``done.json`` was never finished."""
ADAPTER = "adapter"
"""The trained adapter in PEFT form: adapter_config.json and adapter_model.safetensors."""
OUTCOME = "outcome.json"
"""What the child found at its end; see ``TrainOutcome``."""


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything that the trained numbers depend on, and where to put them. Paths are absolute.

    ``rows`` of ``n_ctx`` tokens make one optimizer step, ``micro_rows`` of them are computed at once in each process.
    ``targets`` are suffixes of GGUF tensors (attn_q, ffn_down), see ``targets.py``.
    """

    base: tuple[str, ...]
    """All shards of the base, in order."""
    dataset: str
    """The file that ``data/child.py`` wrote."""
    run_dir: str
    lib_dir: str
    """The Toolchain's libraries: to_float comes from its libggml-base."""
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rslora: bool
    dora: bool
    n_ctx: int
    rows: int
    micro_rows: int
    steps: int
    learning_rate: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    seed: int
    checkpoint_steps: int
    gradient_checkpointing: bool
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    n_threads: int
    packed: bool = True
    """False unpacks the base while loading: the yardstick of gradients, memory and speed."""
    probe_steps: int = 0
    """Above 0: take so many steps, tell what they cost, write nothing but the outcome."""

    def write(self, path: Path) -> None:
        files.write_json(path, asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainSpec:
        return cls(**{**value, "base": tuple(value["base"]), "targets": tuple(value["targets"])})


@dataclass(frozen=True, kw_only=True)
class StepLine:
    """One line of the loss curve. ``loss`` is the mean cross entropy (nats) over the step's learned tokens.

    Time is not in it: an interrupted and resumed run writes the same bytes as one that was not. ``grad_norm``, before
    it is cut down, is None where the engine does not tell it (ggml).
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    learned_tokens: int


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a training or a probe found. Bytes are of the largest process; ``held_out`` losses are in nats a token.

    ``weight_bytes`` are the base's tensors as they lie in memory, ``peak_bytes`` the most memory in use at any time
    beyond ``import_bytes``, what the process had before the base was loaded.
    """

    steps: int
    tokens_per_second: float
    seconds_per_step: float
    weight_bytes: int
    import_bytes: int
    peak_bytes: int
    trained_parameters: int
    held_out_before: float | None
    held_out_after: float | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainOutcome:
        return cls(**value)
