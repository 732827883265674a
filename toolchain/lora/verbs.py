"""What `inv lora` and `inv merge` do and report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from toolchain.base import console, files
from toolchain.base.command import shown
from toolchain.base.errors import UsageError
from toolchain.build.verbs import ensure_current
from toolchain.lora import report
from toolchain.lora.forms.merge_files import MergedModel
from toolchain.lora.judging.evaluate import text_file
from toolchain.lora.probe import TrainingPlan
from toolchain.lora.recipe import SCHEMA_NAME, load_lora_recipe, schema_text
from toolchain.lora.run import merged, plan_only, run
from toolchain.lora.training import look_up
from toolchain.pipeline.recipe import BUILTIN_CORPUS

Form = Literal["convert", "from-peft", "to-peft"]
Converted = tuple[Mapping[str, object], Sequence[str]]
"""What `--json` tells of a conversion, and the same for people."""


def lora(recipe: Path, *, dry_run: bool, fresh: bool, as_json: bool) -> None:
    """``inv lora RECIPE``: train what is not trained yet; its figures and how to use it on stdout."""
    if dry_run and fresh:
        raise UsageError("--dry-run trains nothing, so nothing can be --fresh", hint="leave one of them out")
    training = look_up(recipe)
    if dry_run:
        plan = plan_only(training)
        if as_json:
            console.answer_json(report.plan_json(training, plan))
        else:
            for line in report.plan_lines(training, plan):
                console.answer(line)
        return

    def tell(plan: TrainingPlan) -> None:
        for line in report.plan_lines(training, plan):
            console.say(line)

    found = run(training, fresh=fresh, tell=tell)
    if as_json:
        console.answer_json(report.result_json(training, found))
        return
    if found.reused:
        console.say("it is trained and judged already; --fresh trains anew")
    console.answer_table(*report.result_table(found))
    for line in report.result_lines(found):
        console.answer(line)


def chosen_form(flags: Mapping[Form, bool], *, base: str | None, output: str | None) -> Form | None:
    """The conversion that was asked for, None where none was; UsageError for what does not go together."""
    named = [form for form, typed in flags.items() if typed]
    if len(named) > 1:
        both = " and ".join(f"--{form}" for form in named)
        raise UsageError(f"{both} exclude each other", hint="convert one at a time")
    if named:
        return named[0]
    for flag, value in (("--base", base), ("--output", output)):
        if value:
            raise UsageError(
                f"{flag} belongs to --convert, --from-peft and --to-peft",
                hint="a recipe names its base itself, and its results go to models/NAME/",
            )
    return None


def convert(
    form: Form, source: Path, *, base: str | None, output: str | None, trains: Mapping[str, bool], as_json: bool
) -> None:
    """``inv lora --convert``, ``--from-peft`` and ``--to-peft``; ``trains`` are options of a training, if typed."""
    for flag, typed in trains.items():
        if typed:
            raise UsageError(f"{flag} does not go with --{form}", hint="train and convert one after the other")
    source = _typed_path(str(source))
    if not base:
        hint = f"add --base MODEL.gguf, the model that {source.name} is for"
        raise UsageError(f"--{form} needs the base: names and shapes are its", hint=hint)
    model = _typed_path(base)
    target = _typed_path(output) if output else source.with_name(_NAMED[form](source))
    for path in (source, model):
        if not path.exists():
            raise UsageError(f"there is no {path}", hint=f"`./inv lora ADAPTER --{form} --base MODEL.gguf`")
    if target.exists():
        raise UsageError(f"{target} is there already", hint="name another one with --output, or delete it")
    log = files.home_dir("logs") / "lora" / f"{form}.log"
    with files.home_in_use():
        found, lines = _CONVERTED[form](source, model, target, log)
    for line in lines:
        console.say(line)
    if as_json:
        console.answer_json({"output": str(target), "base": str(model), **found})
        return
    console.answer(str(target))
    if form != "to-peft":
        console.answer(f"use it: python -m runtime chat {shown([model])} --lora {shown([target])}")


def merge(source: Path, *, base: str | None, output: str | None, asked_type: str | None, as_json: bool) -> None:
    """``inv merge RECIPE``, or ``ADAPTER --base BASE``: the file made and how far it is from both, on stdout."""
    if base:
        made = _merge_files(_typed_path(str(source)), _typed_path(base), output, asked_type)
    elif source.suffix == ".gguf":
        raise UsageError(f"{source} is no recipe", hint=f"`./inv merge {shown([source])} --base MODEL.gguf`")
    elif output:
        raise UsageError("--output belongs to --base", hint="a recipe's results go to models/NAME/")
    else:
        made = merged(look_up(source), asked_type)
    if as_json:
        console.answer_json(report.merged_json(made))
        return
    console.answer_table(*report.merged_table(made))
    console.answer(f"use it: python -m runtime chat {shown([made.path])}")


def check_schema(recipes: Path) -> None:
    """Raise UsageError when the schema file is not what the recipe model says, or a shipped recipe is wrong."""
    path = recipes / SCHEMA_NAME
    if not path.is_file() or path.read_text() != schema_text():
        raise UsageError(f"{path} is out of date", hint="run `./inv schema` and commit the result")
    for recipe in sorted(recipes.glob("*.yaml")):
        load_lora_recipe(recipe)


def write_schema(recipes: Path) -> None:
    (recipes / SCHEMA_NAME).write_text(schema_text())


_NAMED: Mapping[Form, Callable[[Path], str]] = {
    "convert": lambda source: f"{source.stem}-lora.gguf",
    "from-peft": lambda source: f"{source.name}.gguf",
    "to-peft": lambda source: f"{source.stem}-peft",
}


def _merge_files(adapter: Path, base: Path, output: str | None, asked_type: str | None) -> MergedModel:
    from toolchain.lora.forms.merge_files import merge_file

    for path in (adapter, base):
        if not path.exists():
            raise UsageError(f"there is no {path}", hint="`./inv merge ADAPTER.gguf --base MODEL.gguf`")
    text = text_file(BUILTIN_CORPUS, adapter.parent)
    target = _typed_path(output) if output else None
    return merge_file(adapter, base, target, text=text, toolchain=ensure_current(), type=asked_type)


def _typed_path(typed: str) -> Path:
    """Absolute, since children run elsewhere, and with a name where ``.`` or ``..`` was typed."""
    return Path(os.path.abspath(files.expand(typed)))


def _convert(source: Path, base: Path, target: Path, log: Path) -> Converted:
    from toolchain.lora.forms.bridge import convert as over_the_bridge

    told = over_the_bridge(source, base, target)
    return asdict(told), told.lines()


def _from_peft(source: Path, base: Path, target: Path, log: Path) -> Converted:
    from toolchain.lora.forms.peft_form import from_peft

    made = from_peft(source, base, target, toolchain=ensure_current(), log=log)
    figures = {"pairs": len(made.pairs), "alpha": made.alpha, "base_sha256": made.base_sha256}
    return figures, [f"{len(made.pairs)} matrices, alpha {made.alpha:g}"]


def _to_peft(source: Path, base: Path, target: Path, log: Path) -> Converted:
    from toolchain.lora.forms.peft_form import to_peft

    to_peft(source, base, target, log=log)
    return {}, []


_CONVERTED: Mapping[Form, Callable[[Path, Path, Path, Path], Converted]] = {
    "convert": _convert,
    "from-peft": _from_peft,
    "to-peft": _to_peft,
}
