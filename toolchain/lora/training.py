"""A LoRA recipe with all that it depends on, looked up and digested: what is to be trained, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.base import files, machine
from toolchain.base.errors import MissingError
from toolchain.base.machine import Machine
from toolchain.build import toolchain as toolchains
from toolchain.build.toolchain import Toolchain
from toolchain.build.verbs import ensure_current
from toolchain.lora import builtin, fingerprint
from toolchain.lora.base import BaseModel, find_base
from toolchain.lora.data.prepare import DataRequest
from toolchain.lora.data.records import DataFile, check_files, require_files
from toolchain.lora.ggml_engine.refuse import check_base, check_recipe
from toolchain.lora.judging.evaluate import text_file
from toolchain.lora.recipe import LoraRecipe, Source, load_lora_recipe
from toolchain.lora.spec import CHECKPOINTS


@dataclass(frozen=True, kw_only=True)
class Training:
    """``engine`` is the build that trains: the library's, or the trainer of 2023.

    ``fingerprint`` names the training and ``judged_by`` its evaluation; work lies in ``run_dir`` and ``data_dir``,
    results in ``folder``.
    """

    recipe: LoraRecipe
    recipe_path: Path
    machine: Machine
    toolchain: Toolchain
    engine: Toolchain
    base: BaseModel
    request: DataRequest
    unrelated: Path
    fingerprint: str
    judged_by: str
    run_dir: Path
    data_dir: Path
    folder: Path
    log: Path

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def adapter(self) -> Path:
        """Where the adapter goes."""
        return self.folder / f"{self.name}-lora.gguf"

    @property
    def steps_done(self) -> int:
        """The steps of the last checkpoint; 0 before the first. Each engine names them by their step."""
        folder = self.run_dir / CHECKPOINTS
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return max((int(digits) for name in names if (digits := name.removeprefix("step-")).isdecimal()), default=0)


def look_up(recipe_path: Path) -> Training:
    """Read the recipe, find its base (made or fetched where it is missing) and hash what it depends on."""
    recipe = load_lora_recipe(recipe_path)
    if recipe.engine == "ggml":
        check_recipe(recipe)
    toolchain = ensure_current()
    engine = _trainer() if recipe.engine == "ggml" else toolchain
    here = machine.probe()
    request = _request(recipe, recipe_path.parent, here)
    require_files(request.files)
    unrelated = text_file(recipe.evaluate.unrelated, recipe_path.parent).absolute()
    base = find_base(recipe.base, recipe_path.parent, toolchain, first=lambda: check_files(request.files))
    if recipe.engine == "ggml":
        check_base(base.header, engine)
    request = replace(request, base=str(base.path))
    data = fingerprint.data_digest(request, base, toolchain)
    training = fingerprint.training_digest(recipe, data, base, engine)
    work = files.home_dir("work") / "lora"
    return Training(
        recipe=recipe,
        recipe_path=recipe_path,
        machine=here,
        toolchain=toolchain,
        engine=engine,
        base=base,
        request=request,
        unrelated=unrelated,
        fingerprint=training,
        judged_by=fingerprint.judging_digest(recipe, data, unrelated, toolchain),
        run_dir=work / training[:20],
        data_dir=work / "data" / data[:20],
        folder=files.models_dir() / recipe.name,
        log=files.home_dir("logs") / recipe.name / "lora.log",
    )


def _request(recipe: LoraRecipe, folder: Path, here: Machine) -> DataRequest:
    """Without its base, which may have to be made or fetched first."""
    data = builtin.with_files(recipe.data)
    return DataRequest(
        base="",
        sources=tuple(_data_file(source, folder) for source in data.sources),
        held_out=data.held_out,
        held_out_file=_data_file(data.held_out_file, folder) if data.held_out_file else None,
        n_ctx=recipe.train.n_ctx,
        packing=data.packing,
        learn_prompts=data.learn_prompts,
        seed=recipe.train.seed,
        n_threads=here.compute_threads,
    )


def _data_file(source: Source, folder: Path) -> DataFile:
    path = (folder / files.expand(source.file)).absolute()
    return DataFile(path=str(path), kind=source.kind, repeat=source.repeat)


def _trainer() -> Toolchain:
    if found := toolchains.current("trainer"):
        return found
    raise MissingError(
        "engine: ggml needs the trainer of 2023, which is not built",
        hint="build it with `./inv build --legacy-finetune` (two minutes), or take engine: torch",
    )
