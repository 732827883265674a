"""Run a Plan: only what is missing, each output staged, checked and renamed into place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from toolchain.base import console, files
from toolchain.base.errors import CommandError, UsageError
from toolchain.pipeline import provenance
from toolchain.pipeline.plan import Plan, Step, source_note

STEP_NOTE = "step.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step that ran (``seconds``) or had nothing to do; ``figures`` are what its check found."""

    id: str
    seconds: float
    reused: bool
    figures: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file that the recipe promises. ``seconds`` is what making it took, in this run or an earlier one."""

    path: Path
    type: str
    bytes: int
    sha256: str
    bits_per_weight: float
    perplexity: float | None
    seconds: float
    reused: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    artifacts: tuple[Artifact, ...]
    steps: tuple[StepResult, ...]


def missing_steps(plan: Plan) -> list[Step]:
    """The steps that have to run: those whose output is wanted and not there."""
    wanted: set[str] = set()
    done: dict[str, bool] = {}

    def want(step: Step) -> None:
        if step.id in done:
            return
        done[step.id] = _is_done(step)
        if not done[step.id]:
            wanted.add(step.id)
            for need in step.needs:
                want(plan.step(need))

    consumed = {need for step in plan.steps for need in step.needs}
    for step in plan.steps:
        if step.artifact or step.id not in consumed:
            want(step)
    return [step for step in plan.steps if step.id in wanted]


def execute(plan: Plan) -> Outcome:
    """Bring every artifact of ``plan`` into being; what is there with the right fingerprint stays.

    Raises the failing stage's error. Whatever finished before it is kept, and the next run goes on there.
    """
    lock = plan.folder / ".lock"
    with files.home_in_use(), files.locked(lock, lambda pid: console.say(f"waiting for process {pid} (same recipe)")):
        refuse_other_model(plan)
        files.sweep(plan.folder)
        todo = missing_steps(plan)
        _require_disk(plan, todo)
        if plan.source.snapshot:
            files.write_json(source_note(plan.recipe), asdict(plan.source.snapshot))
        results = [_run(plan, step) if step in todo else _reuse(step) for step in plan.steps]
        outcome = Outcome(artifacts=_artifacts(plan, results), steps=tuple(results))
        _write_manifest(plan, outcome)
    return outcome


def make_step(plan: Plan, step_id: str) -> Path:
    """The output of one intermediate step, made with all that it needs where it is not there."""
    step = plan.step(step_id)
    with files.home_in_use():
        if not _is_done(step):
            for need in step.needs:
                make_step(plan, need)
            _require_disk(plan, [step])
            _run(plan, step)
    return step.output


def refuse_other_model(plan: Plan) -> None:
    """UsageError when the results folder belongs to another model: one of the same name would replace its files."""
    known = files.read_json(plan.folder / MANIFEST)
    model = _model_name(plan)
    if isinstance(known, dict) and known.get("model") not in (None, model):
        raise UsageError(
            f"{plan.folder} holds the files of another model",
            evidence=f"they were made from {known['model']}, this recipe's model is {model}",
            hint=f"give the recipe another name, or delete {plan.folder}",
        )


def _model_name(plan: Plan) -> str:
    return f"{plan.source.kind}:{plan.source.path or plan.source.name}"


def _require_disk(plan: Plan, todo: list[Step]) -> None:
    """Compare what the missing steps write with what is free, file system by file system."""
    needed: dict[int, tuple[Path, int]] = {}
    for step in todo:
        place = files.existing(step.output)
        device = place.stat().st_dev
        needed[device] = (step.output, needed.get(device, (place, 0))[1] + step.stage.bytes)
    for output, count in needed.values():
        files.require_free(output, count, f"the files of {plan.recipe.name}")


def _is_done(step: Step) -> bool:
    if step.artifact:
        return provenance.is_current(step)
    noted = files.read_json(step.output.parent / STEP_NOTE)
    same = isinstance(noted, dict) and noted.get("fingerprint") == step.fingerprint
    return same and step.stage.present(step.output)


def _run(plan: Plan, step: Step) -> StepResult:
    log = files.home_dir("logs") / plan.recipe.name / f"{step.id.replace(' ', '-')}.log"
    log.unlink(missing_ok=True)
    with console.step(step.stage.title) as shown:
        if step.artifact:
            figures, seconds = _make_artifact(plan, step, log, shown)
        else:
            figures, seconds = _make_intermediate(step, log, shown)
    return StepResult(id=step.id, seconds=seconds, reused=False, figures=figures)


def _make_artifact(plan: Plan, step: Step, log: Path, shown: console.Step) -> tuple[Mapping[str, object], float]:
    with files.staging(step.output) as partial:
        seconds = _run_stage(step, partial, log, shown)
        figures = step.stage.check(partial)
        provenance.place(partial, step, provenance.describe(plan, step, partial, seconds=seconds, figures=figures))
    return figures, seconds


def _make_intermediate(step: Step, log: Path, shown: console.Step) -> tuple[Mapping[str, object], float]:
    """The output and its note appear together, as one folder named by the fingerprint."""
    folder = step.output.parent
    with files.locked(folder.with_name(folder.name + ".lock")):
        if _is_done(step):  # another recipe made it while we waited
            return _reuse(step).figures, 0.0
        with files.staged(folder) as partial:
            partial.mkdir()
            output = partial / step.output.name
            seconds = _run_stage(step, output, log, shown)
            figures = step.stage.check(output)
            note = {"id": step.id, "fingerprint": step.fingerprint, "seconds": seconds, "figures": dict(figures)}
            files.write_json(partial / STEP_NOTE, note)
    return figures, seconds


def _run_stage(step: Step, output: Path, log: Path, shown: console.Step) -> float:
    """The seconds it took. A child that fails on a full disk rarely says why: we look while its file is there."""
    started = time.monotonic()
    try:
        step.stage.run(output, log=log, on_progress=shown.advance)
    except CommandError as error:
        if files.is_full(output):
            raise files.disk_full(output.parent, error.evidence) from error
        raise
    return time.monotonic() - started


def _reuse(step: Step) -> StepResult:
    if step.artifact:
        return StepResult(id=step.id, seconds=0.0, reused=True, figures=provenance.read_sidecar(step.output))
    noted = files.read_json(step.output.parent / STEP_NOTE)
    figures = noted.get("figures", {}) if isinstance(noted, dict) else {}
    return StepResult(id=step.id, seconds=0.0, reused=True, figures=figures)


def _artifacts(plan: Plan, results: list[StepResult]) -> tuple[Artifact, ...]:
    found = {result.id: result for result in results}
    artifacts = []
    for entry in plan.recipe.quantize:
        step = plan.step(f"quantize {entry.label}")
        judged = found.get(f"evaluate {entry.label}")
        if judged:
            provenance.add_quality(step.output, judged.figures)
        noted = provenance.read_sidecar(step.output)
        artifacts.append(
            Artifact(
                path=step.output,
                type=entry.label,
                bytes=int(_figure(noted, "bytes")),
                sha256=str(noted["sha256"]),
                bits_per_weight=_figure(noted, "bits_per_weight"),
                perplexity=_figure(judged.figures, "perplexity") if judged else None,
                seconds=_figure(noted, "seconds"),
                reused=found[step.id].reused,
            )
        )
    return tuple(artifacts)


def _figure(noted: Mapping[str, object], name: str) -> float:
    value = noted[name]
    assert isinstance(value, int | float)
    return value


def _write_manifest(plan: Plan, outcome: Outcome) -> None:
    """What the runtime needs to find a recipe's result: the artifacts in the recipe's order."""
    manifest = {
        "recipe": plan.recipe.name,
        "model": _model_name(plan),
        "artifacts": [
            {"type": a.type, "file": a.path.name, "bytes": a.bytes, "sha256": a.sha256} for a in outcome.artifacts
        ],
        "runtime": plan.recipe.runtime.model_dump(exclude_none=True) if plan.recipe.runtime else None,
    }
    path = plan.folder / MANIFEST
    if files.read_json(path) != manifest:
        files.write_json(path, manifest)
