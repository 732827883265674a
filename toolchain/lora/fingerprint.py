"""What the tokens, the training and the judgement of a recipe depend on, each as one digest.

Known before anything is started, so a second run can tell that there is nothing to do. Not in it: how often a
checkpoint is written, and where the results go.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from toolchain.base import files
from toolchain.build.toolchain import Toolchain
from toolchain.lora.base import BaseModel
from toolchain.lora.data.prepare import DataRequest
from toolchain.lora.recipe import LoraRecipe
from toolchain.stages.stage import package_version

PACKAGES: Final = ("torch", "transformers", "peft", "accelerate")
"""Of the torch engine; a GPU's torch has another version than a CPU's."""
_DATA_FORMAT: Final = 1
_TRAINING_FORMAT: Final = 1
_JUDGING_FORMAT: Final = 1
"""Raised when what is made of the same request becomes another."""
_NOT_LEARNED: Final = frozenset({"checkpoint_steps"})
_NOT_JUDGED: Final = frozenset({"max_drift_kld"})


def data_digest(request: DataRequest, base: BaseModel, toolchain: Toolchain) -> str:
    """Of the tokens: the files by content, the base by header and weights (the library's logits are among them)."""
    with base.path.open("rb") as file:
        header = hashlib.sha256(file.read(base.header.data_offset)).hexdigest()
    parts = [[one.kind, one.repeat, files.known_sha256(Path(one.path))] for one in request.files]
    asked = [request.held_out, request.held_out_file is not None, request.n_ctx, request.packing]
    asked += [request.learn_prompts, request.seed]
    return files.digest([_DATA_FORMAT, parts, asked, header, base.tensors_sha256, toolchain.id])


def training_digest(recipe: LoraRecipe, data: str, base: BaseModel, engine: Toolchain) -> str:
    """Of the adapter. ``engine`` is the build whose code it goes through: the library's, or the trainer's."""
    packages = {name: package_version(name) for name in PACKAGES} if recipe.engine == "torch" else {}
    asked = {
        "engine": recipe.engine,
        "adapter": recipe.adapter.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude=set(_NOT_LEARNED)),
        "minutes": recipe.budget.minutes,
    }
    return files.digest([_TRAINING_FORMAT, asked, data, base.tensors_sha256, engine.id, packages])


def judging_digest(recipe: LoraRecipe, data: str, unrelated: Path, toolchain: Toolchain) -> str:
    """Of what an adapter is worth, but for the bound that it is held against."""
    asked = recipe.evaluate.model_dump(mode="json", exclude=set(_NOT_JUDGED))
    return files.digest([_JUDGING_FORMAT, asked, data, files.known_sha256(unrelated), toolchain.id])
