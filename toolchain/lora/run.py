"""A LoRA recipe from beginning to end: plan, train or go on, judge, put the results in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.base import console, files
from toolchain.base.errors import UsageError
from toolchain.lora import results
from toolchain.lora.data.prepare import Prepared
from toolchain.lora.engines import finished, run_ggml, run_torch
from toolchain.lora.forms.merge_files import MergedModel, merge_recipe
from toolchain.lora.judging.judge import judge, require_little_drift
from toolchain.lora.plan import train_spec
from toolchain.lora.probe import TrainingPlan, make_plan, prepared
from toolchain.lora.progress import Progress
from toolchain.lora.results import REFUSED, Results
from toolchain.lora.spec import CHECKPOINTS, TrainOutcome
from toolchain.lora.training import Training

Tell = Callable[[TrainingPlan], None]


def run(training: Training, *, fresh: bool, tell: Tell) -> Results:
    """The results of the recipe; what is done already is not done again, and an interrupted training goes on.

    ``tell`` gets the plan before anything is trained. Raises the failing part's error; ArtifactError when the drift is
    above the recipe's bound, with the files in a folder of their own then.
    """
    with _alone(training):
        results.refuse_other_base(training)
        if fresh:
            files.remove(training.run_dir, within=training.run_dir.parent)
            results.distrust(training)
        elif found := results.current(training):
            return _held_against(training, found)
        else:
            results.take_back(training)
        outcome = finished(training.run_dir)
        if outcome is None:
            plan = make_plan(training)
            tell(plan)
            outcome = _train(training, plan)
        return _judged(training, outcome)


def plan_only(training: Training) -> TrainingPlan:
    """What would be done, after a short probe; nothing is trained, and there is no folder of results."""
    with _at_work(training):
        results.refuse_other_base(training)
        return make_plan(training)


def merged(training: Training, asked_type: str | None) -> MergedModel:
    """The base with the recipe's adapter in it, held against both on the held-out text. UsageError before training."""
    with _alone(training):
        found = results.trained(training)
        if found is None:
            changed = "of another version of this recipe" if training.adapter.exists() else "not trained yet"
            raise UsageError(
                f"the adapter of {training.name} is {changed}",
                evidence=f"looked for {training.adapter}",
                hint=f"`./inv lora {training.recipe_path}` trains it",
            )
        return _merge(training, found.adapter, prepared(training), asked_type)


def _train(training: Training, plan: TrainingPlan) -> TrainOutcome:
    recipe, run_dir, steps = training.recipe, training.run_dir, plan.length.steps
    if done := training.steps_done:
        console.say(f"goes on at step {done + 1} of {steps}")
    with console.step(f"train {training.name}") as shown:
        progress = Progress(shown, steps=steps, tokens=recipe.train.batch * recipe.train.n_ctx, done=done)
        if plan.means is None:
            outcome = run_ggml(training, plan.data, steps=steps, on_step=progress.on_step)
        else:
            spec = train_spec(
                recipe,
                training.base,
                plan.means,
                dataset=plan.data.dataset,
                run_dir=run_dir,
                toolchain=training.toolchain,
                steps=steps,
            )
            what, processes = f"training {training.name}", plan.means.processes
            outcome = run_torch(spec, processes=processes, what=what, log=training.log, on_line=progress.on_line)
        shown.note = f"{outcome.tokens_per_second:,.0f} tokens/s"
    files.remove(run_dir / CHECKPOINTS, within=run_dir)
    return outcome


def _judged(training: Training, outcome: TrainOutcome) -> Results:
    """Judge what was trained and put it where it belongs by that."""
    data, adapter = prepared(training), results.with_notes(training)
    # no runtime applies magnitudes: a DoRA adapter is judged as the model that it is merged into
    merged = _merge(training, adapter, data, None).path if training.recipe.adapter.dora else None
    found = judge(training, data, merged or training.base.path, None if merged else adapter)
    most = training.recipe.evaluate.max_drift_kld
    if most is not None and found.drift.mean_kld > most:
        kept = training.folder / REFUSED
        results.withdraw(training)
        merged = results.moved(merged, kept) if merged else None
        results.place(training, data, outcome, found, adapter=adapter, merged=merged, folder=kept)
        require_little_drift(found.drift, most, kept=kept)
    return results.place(training, data, outcome, found, adapter=adapter, merged=merged, folder=training.folder)


def _held_against(training: Training, found: Results) -> Results:
    """Results that are there, unless the recipe's bound is lower by now."""
    most = training.recipe.evaluate.max_drift_kld
    drift = found.noted["quality"]["drift_kld"]
    if most is not None and drift > most:
        results.take_back(training)
        outcome = finished(training.run_dir)
        assert outcome is not None
        return _judged(training, outcome)
    return found


def _merge(training: Training, adapter: Path, data: Prepared, asked_type: str | None) -> MergedModel:
    return merge_recipe(
        training.recipe,
        training.base,
        adapter,
        recipe_dir=training.recipe_path.parent,
        text=data.held_text if data.facts.held_tokens else training.unrelated,
        toolchain=training.toolchain,
        type=asked_type,
    )


@contextmanager
def _alone(training: Training) -> Iterator[None]:
    """Hold the results and the work against other processes of the same recipe, or of the same training."""
    with files.locked(training.folder / ".lock", _waits("same recipe")), _at_work(training):
        files.sweep(training.folder)
        yield


@contextmanager
def _at_work(training: Training) -> Iterator[None]:
    lock = training.run_dir.with_name(training.run_dir.name + ".lock")
    with files.home_in_use(), files.locked(lock, _waits("same training")):
        yield


def _waits(what: str) -> Callable[[str], None]:
    return lambda pid: console.say(f"waiting for process {pid} ({what})")
