"""A recipe as the command line of ``finetune``. Pure.

What its options mean is read from examples/finetune/finetune.cpp and common/train.cpp of llama.cpp at ac9ee6a, not from
its help: ``--adam-iter`` counts optimizer steps from the checkpoint on, ``--enable-restart`` takes no value and is what
lets the cosine begin behind the warmup, and the options of the feed-forward ranks are never recognized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toolchain.base.gguf import GgufHeader
from toolchain.lora.ggml_engine.start import LAYER, WHOLE, ranks
from toolchain.lora.recipe import LoraRecipe, Training
from toolchain.lora.targets import target_suffixes

RANK_OPTIONS: Final = {
    **{"attn_q": "wq", "attn_k": "wk", "attn_v": "wv", "attn_output": "wo"},
    **{"token_embd": "tok-embd", "output": "out"},
}
OWN_TARGETS: Final = frozenset({*WHOLE, *(name for name in LAYER if name.endswith("_norm"))})
"""What this engine can learn and the other cannot: embedding, output and norms, when they are named."""
LOGITS_BYTES: Final = 1 << 28
"""Of the logits for the rows that are computed at once, and once more of the expected ones; the recipe may say it."""


def settle_targets(base: GgufHeader, asked: Sequence[str] | str) -> tuple[str, ...]:
    """GGUF suffixes of the weights to learn, sorted; UsageError for a name that the base has no weight of."""
    if isinstance(asked, str):
        return target_suffixes([base], asked)
    rest = [name for name in asked if name not in OWN_TARGETS]
    named = {name for name in asked if name in OWN_TARGETS}
    return tuple(sorted({*named, *(target_suffixes([base], rest) if rest else ())}))


def micro_rows(train: Training, n_vocab: int) -> int:
    """Rows that are computed at once: a divisor of the batch, so the mean over the parts is that over the whole."""
    if train.micro_batch:
        return train.micro_batch
    divisors = [rows for rows in range(1, train.batch + 1) if train.batch % rows == 0]
    return max(rows for rows in divisors if rows == 1 or rows * train.n_ctx * n_vocab * 4 <= LOGITS_BYTES)


def warmup_steps(train: Training, steps: int) -> int:
    """At most all steps but one, so something is left to the schedule."""
    return min(round(train.warmup * steps), steps - 1)


def rate_at(train: Training, steps: int, step: int) -> float:
    """The learning rate of ``step``, counted from 1: ``learning_schedule`` of common/train.cpp with the options below.

    A step of the warmup has its share of the rate, beginning with none; the cosine falls over what is left.
    """
    done, warmup = step - 1, warmup_steps(train, steps)
    if done < warmup:
        return train.learning_rate * done / warmup
    if train.schedule == "constant":
        return train.learning_rate
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup)))


def finetune_argv(
    program: Path,
    recipe: LoraRecipe,
    *,
    base: Path,
    text: str,
    targets: tuple[str, ...],
    n_vocab: int,
    start: int,
    steps: int,
    n_threads: int,
) -> tuple[str, ...]:
    """Train from the checkpoint ``start`` of the current folder to ``steps``; it is a pure function of what is given.

    Checkpoints are named by their step in the current folder; the second copy that the trainer writes of each, under
    the name of ``--fn-latest``, goes nowhere. The order of the data depends on the word ``text`` too: it has to be the
    same when a run goes on, so it should be relative. The adapter is not written: see ``write_lora_argv``.
    """
    train = recipe.train
    rows = micro_rows(train, n_vocab)
    warmup = warmup_steps(train, steps)
    return (
        *_shape(program, recipe, base=base, targets=targets, checkpoint=str(start), n_threads=n_threads),
        *("--train-data", text, "--lora-out", ""),
        *("--checkpoint-out", "ITERATION", "--pattern-fn-it", "ITERATION", "--fn-latest", "/dev/null"),
        *("--save-every", str(train.checkpoint_steps), "--adam-iter", str(steps - start)),
        *("--batch", str(rows), "--grad-acc", str(train.batch // rows)),
        *("--adam-alpha", repr(train.learning_rate), "--warmup", str(warmup)),
        *("--cos-decay-steps", str(steps - warmup), "--enable-restart"),
        *("--cos-decay-min", "1" if train.schedule == "constant" else "0"),
        *("--adam-decay", repr(train.weight_decay), "--adam-gclip", repr(train.max_grad_norm)),
        "--no-checkpointing" if train.gradient_checkpointing is False else "--use-checkpointing",
    )


def write_lora_argv(
    program: Path,
    recipe: LoraRecipe,
    *,
    base: Path,
    targets: tuple[str, ...],
    checkpoint: int,
    output: Path,
    n_threads: int,
) -> tuple[str, ...]:
    """Write the adapter that the checkpoint of that step holds, as ggla, to ``output``; nothing is trained."""
    common = _shape(program, recipe, base=base, targets=targets, checkpoint=str(checkpoint), n_threads=n_threads)
    return (*common, "--only-write-lora", "--lora-out", str(output))


def _shape(
    program: Path, recipe: LoraRecipe, *, base: Path, targets: tuple[str, ...], checkpoint: str, n_threads: int
) -> tuple[str, ...]:
    """What a checkpoint is bound to. alpha is the rank: the trainer learns at a scale of 1, whatever alpha is."""
    rank = recipe.adapter.rank
    wide = ranks(rank, targets)
    return (
        *(str(program), "--model-base", str(base), "--checkpoint-in", checkpoint),
        *("--lora-r", str(rank), "--lora-alpha", str(rank)),
        *(word for name, option in RANK_OPTIONS.items() for word in (f"--rank-{option}", str(wide[name]))),
        *("--seed", str(recipe.train.seed), "--ctx", str(recipe.train.n_ctx), "--threads", str(n_threads)),
    )
