"""The plan of a training: chosen by arithmetic, tried for a few steps, and kept beside the training's work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from toolchain.base import console, files
from toolchain.base.errors import UsageError
from toolchain.lora.data.prepare import Prepared, prepare_data
from toolchain.lora.engines import run_torch
from toolchain.lora.estimate import MARGIN, Work
from toolchain.lora.judging.evaluate import SMALLEST_WINDOW
from toolchain.lora.plan import Length, Means, require_measured_fit, settle_length, settle_means, train_spec
from toolchain.lora.spec import TrainOutcome
from toolchain.lora.training import Training

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is going to happen. The ggml engine chooses its own means and is not probed: it begins within a second."""

    data: Prepared
    length: Length
    means: Means | None
    probe: TrainOutcome | None

    @property
    def seconds(self) -> float | None:
        """Of the training alone."""
        return self.probe.seconds_per_step * self.length.steps if self.probe else None


def make_plan(training: Training) -> TrainingPlan:
    """Settle the training, or take what was settled for it. Its data is prepared, and a few steps are tried.

    Raises MemoryFitError before torch is started when no way of computing fits, after the probe when it took more.
    """
    known = _known(training)
    means = _means(training, known) if training.recipe.engine == "torch" else None
    data = prepared(training)
    if means is None:
        return TrainingPlan(
            data=data, length=settle_length(training.recipe, rows=data.facts.rows), means=None, probe=None
        )
    same = known.get("work") == asdict(means.work)
    probe = TrainOutcome.from_json(known["probe"]) if same else _probe(training, means, data)
    require_measured_fit(probe, means)
    length = settle_length(training.recipe, rows=data.facts.rows, seconds_per_step=probe.seconds_per_step)
    if "length" in known and training.steps_done:  # what has begun does not change with the machine's load
        length = Length(**known["length"])
    note = {"work": asdict(means.work), "probe": asdict(probe), "length": asdict(length)}
    files.write_json(training.run_dir / PLAN, note)
    return TrainingPlan(data=data, length=length, means=means, probe=probe)


def prepared(training: Training) -> Prepared:
    """The tokens and texts of the recipe's data, made where they are not there."""
    folder = training.data_dir
    lock = files.locked(folder.with_name(folder.name + ".lock"))
    with lock, console.step("prepare the data", quiet_s=0.5) as step:
        data = prepare_data(training.request, folder, log=training.log, on_progress=step.advance)
    _require_data(training, data)
    return data


def _means(training: Training, known: Mapping[str, Any]) -> Means:
    """As settled before where that still fits: other micro-batches would add up in another order."""
    means = settle_means(training.recipe, training.base, training.machine)
    if "work" in known and means.work != (work := Work(**known["work"])):
        as_before = settle_means(training.recipe, training.base, training.machine, work=work)
        if as_before.need.total <= MARGIN * as_before.free_bytes:
            return as_before
    return means


def _probe(training: Training, means: Means, data: Prepared) -> TrainOutcome:
    folder = training.run_dir / "probe"
    with files.staging(folder) as partial:
        partial.mkdir()
        spec = train_spec(
            training.recipe,
            training.base,
            means,
            dataset=data.dataset,
            run_dir=partial,
            toolchain=training.toolchain,
            steps=training.recipe.train.steps or 1,
            probe=True,
        )
        with console.step(f"try {spec.probe_steps} steps") as step:
            outcome = run_torch(
                spec,
                processes=means.processes,
                what="trying a few steps",
                log=training.log,
                on_line=lambda _: None,
            )
            step.note = f"{outcome.seconds_per_step:.2f} s a step, {console.format_bytes(outcome.peak_bytes)}"
    return outcome


def _known(training: Training) -> Mapping[str, Any]:
    noted = files.read_json(training.run_dir / PLAN)
    return noted if isinstance(noted, dict) else {}


def _require_data(training: Training, data: Prepared) -> None:
    facts = data.facts
    if not facts.learned_tokens:
        raise UsageError(
            f"nothing is learned from the data of {training.name}",
            evidence=f"{facts.examples} examples, {facts.dropped} dropped; the longest has {facts.longest} tokens",
            hint="raise train.n_ctx, or set data.learn_prompts",
        )
    judged = training.request.held_out or training.request.held_out_file
    if judged and facts.held_tokens < 2 * SMALLEST_WINDOW:
        raise UsageError(
            "the held-out part is too small to judge the adapter by",
            evidence=f"{facts.held_examples} examples, {facts.held_tokens} tokens; {2 * SMALLEST_WINDOW} are the least",
            hint="raise data.held_out, name a data.held_out_file, or set data.held_out to 0 to go without",
        )
