"""The checkpoint that a training begins with: the recipe's targets at random, everything else at rest.

Left to itself the trainer also learns the embedding, the output matrix and all norms, and a rank of 0 ends it with an
assertion. But the gradient of a pair's A is a multiple of its B, and that of B of its A: a pair that begins with zeros
in both never moves. So a first checkpoint of our own makes the trainer learn what was asked for and nothing else.

The form is that of ``save_checkpoint_lora_gguf`` (examples/finetune/finetune.cpp) with ``save_train_state_gguf`` and
``save_opt_context_gguf`` (common/train.cpp); the keys of the shuffled order are left out, so the trainer draws it by
its seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toolchain.base import files
from toolchain.base.gguf import GgufHeader

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

WHOLE: Final = ("token_embd", "output_norm", "output")
LAYER: Final = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_down", "ffn_up"),
)
"""Tensors of the base, of all of it and of each block, in the trainer's order."""


def ranks(rank: int, targets: tuple[str, ...]) -> dict[str, int]:
    """The rank of each of WHOLE and LAYER: ``rank`` for ``targets``, 1 for norms and for what rests.

    The feed-forward matrices have ``rank`` either way: the trainer looks for ``--rank-ffn_gate`` in words whose
    underscores it has replaced, so it never finds the option.
    """
    wide = {*targets, "ffn_gate", "ffn_down", "ffn_up"}
    return {name: rank if name in wide and not name.endswith("_norm") else 1 for name in (*WHOLE, *LAYER)}


def write_start(path: Path, base: GgufHeader, *, rank: int, targets: tuple[str, ...], seed: int) -> None:
    """Write the checkpoint of step 0 to ``path`` in one step. ``base`` was taken by ``refuse.check_base``.

    A of a target is drawn as ``randomize_lora`` does, but by numpy's generator: normal, clipped to 1, over
    sqrt(rank + inputs); B is zero.
    """
    import gguf
    import numpy as np

    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    width_of = ranks(rank, targets)
    random = np.random.default_rng(seed)
    n_layer = base.n_layer or 0
    names = [*WHOLE, *(f"blk.{layer}.{name}" for layer in range(n_layer) for name in LAYER)]
    halves: dict[str, NDArray[np.float32]] = {}
    for name in names:
        kind = name.rpartition(".")[2]
        inputs, outputs = (*shapes[f"{name}.weight"], 1)[:2]
        a = np.zeros((inputs, width_of[kind]), dtype=np.float32)
        if kind in targets:
            a[:] = np.clip(random.standard_normal(a.shape, dtype=np.float32), -1, 1) / math.sqrt(inputs + a.shape[1])
        halves[f"{name}.weight.lora_a"] = a
        halves[f"{name}.weight.lora_b"] = np.zeros((outputs, a.shape[1]), dtype=np.float32)
    n_parameters = sum(half.size for half in halves.values())
    moments = np.zeros(n_parameters, dtype=np.float32)
    with files.disk_errors(path), files.staged(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        try:
            for key, value in _integers(base, width_of).items():
                writer.add_uint32(key, value)
            _add_state(writer, n_parameters)
            for name, half in halves.items():
                writer.add_tensor(name, half)
            writer.add_tensor("optimizer.adam.first_moments", moments)
            writer.add_tensor("optimizer.adam.second_moments", moments)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _integers(base: GgufHeader, width_of: Mapping[str, int]) -> dict[str, int]:
    shape = ("embedding_length", "feed_forward_length", "attention.head_count", "block_count")
    known = {f"llama.{key}": base.arch_int(key) for key in shape}
    return {
        "general.file_type": 0,
        **{key: value for key, value in known.items() if value is not None},
        "llama.attention.head_count_kv": base.arch_int("attention.head_count") or 0,
        **{f"training.lora.rank.{name}": width for name, width in width_of.items()},
        "training.file_version": 1,
        "optimizer.file_version": 0,
        "optimizer.convergence_past_count": 0,
        "optimizer.iteration_count": 0,
        "optimizer.adam.no_improvement_count": 0,
    }


def _add_state(writer: gguf.GGUFWriter, n_parameters: int) -> None:
    writer.add_string("training.type", "finetune_lora")
    for count in ("iteration", "sample", "token", "epoch"):
        writer.add_uint64(f"training.{count}_count", 0)
    writer.add_string("optimizer.type", "adam")
    writer.add_uint64("optimizer.parameter_count", n_parameters)
    writer.add_bool("optimizer.just_initialized", True)
    writer.add_float32("optimizer.adam.best_loss", 0.0)
    writer.add_float32("optimizer.adam.previous_loss", 0.0)
