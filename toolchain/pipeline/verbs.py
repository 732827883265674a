"""What `inv quantize` does and reports, with and without ``--dry-run``."""

from __future__ import annotations

from pathlib import Path

from toolchain.base import console, files
from toolchain.base.errors import UsageError
from toolchain.build import toolchain
from toolchain.build.toolchain import Toolchain
from toolchain.build.verbs import ensure_current
from toolchain.pipeline import report
from toolchain.pipeline.execute import execute, missing_steps, refuse_other_model
from toolchain.pipeline.plan import Plan, describe_source, make_plan
from toolchain.pipeline.recipe import SCHEMA_NAME, load_recipe, schema_text


def quantize(recipe_path: Path, *, update: bool = False, as_json: bool = False) -> None:
    """Plan and execute ``recipe_path``; a table of the artifacts, or one JSON object, on stdout."""
    recipe = load_recipe(recipe_path)
    source = describe_source(recipe, recipe_path.parent, update=update)
    plan = make_plan(recipe, recipe_path=recipe_path, source=source, toolchain=ensure_current())
    outcome = execute(plan)
    if as_json:
        console.answer_json(report.outcome_json(plan, outcome))
        return
    if all(step.reused for step in outcome.steps):
        console.say("all steps were done already")
    console.answer_table(*report.outcome_table(outcome))


def show_plan(recipe_path: Path, *, update: bool, as_json: bool) -> None:
    """``inv quantize --dry-run``: the plan, without making anything."""
    recipe = load_recipe(recipe_path)
    source = describe_source(recipe, recipe_path.parent, update=update)
    plan = make_plan(recipe, recipe_path=recipe_path, source=source, toolchain=toolchain.current() or _unbuilt())
    refuse_other_model(plan)
    todo = missing_steps(plan)
    if as_json:
        console.answer_json(report.plan_json(plan, todo))
        return
    _warn_unbuilt(plan)
    for line in report.plan_lines(plan, todo):
        console.answer(line)


def check_schema(recipes: Path) -> None:
    """Raise UsageError when the schema file is not what the recipe model says, or a shipped recipe is wrong."""
    path = recipes / SCHEMA_NAME
    if not path.is_file() or path.read_text() != schema_text():
        raise UsageError(f"{path} is out of date", hint="run `./inv schema` and commit the result")
    for recipe in sorted(recipes.glob("*.yaml")):
        load_recipe(recipe)


def write_schema(recipes: Path) -> None:
    (recipes / SCHEMA_NAME).write_text(schema_text())


def _unbuilt() -> Toolchain:
    """What stands for the default toolchain in a plan that is only shown."""
    return Toolchain(
        id="unbuilt",
        root=files.home_dir("toolchains") / "unbuilt",
        commit="",
        backends=(),
        wheel_name="",
        wheel_version="",
        source="",
        options=(),
        compilers=(),
        seconds=0.0,
    )


def _warn_unbuilt(plan: Plan) -> None:
    if plan.toolchain.id == "unbuilt":
        console.warn("no toolchain yet: `./inv build` (or the recipe itself) compiles llama.cpp first")
