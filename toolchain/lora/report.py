"""A training's plan and results as lines for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from toolchain.base.command import shown
from toolchain.base.console import format_bytes
from toolchain.lora.forms.merge_files import MergedModel
from toolchain.lora.probe import TrainingPlan
from toolchain.lora.progress import duration
from toolchain.lora.results import BESIDE, Results
from toolchain.lora.training import Training

Table = tuple[Sequence[str], list[Sequence[str]]]


def plan_lines(training: Training, plan: TrainingPlan) -> list[str]:
    """What is going to be trained on what, and what that takes."""
    recipe, facts, length = training.recipe, plan.data.facts, plan.length
    train, adapter = recipe.train, recipe.adapter
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    alpha = adapter.rank if recipe.engine == "ggml" else adapter.counted_alpha  # the trainer knows no other scale
    kind = " + DoRA" if adapter.dora else " + rsLoRA" if adapter.rslora else ""
    cut = f" (as many as {recipe.budget.minutes:g} minutes allow)" if length.cut else ""
    lines = [
        f"base      {training.base.name}, {training.base.header.architecture}, "
        f"{training.base.n_params / 1e6:,.1f}M parameters in {format_bytes(training.base.tensor_bytes)}",
        f"data      {facts.examples:,} examples, {facts.tokens:,} tokens, {_share(facts)} of them learned; "
        f"{facts.rows:,} rows of {train.n_ctx}",
        f"held out  {facts.held_examples:,} examples, {facts.held_tokens:,} tokens",
        f"adapter   rank {adapter.rank}, alpha {alpha:g}{kind}, on {targets}{_trained(plan)}",
        f"steps     {length.steps:,}{cut} of {train.batch * train.n_ctx:,} tokens: {length.epochs:.2g} epochs",
    ]
    lines += [f"left out  {text}" for text in _left_out(facts)]
    if plan.means is None or plan.probe is None:
        return [*lines, f"engine    the trainer of 2023 ({training.engine.id})"]
    means, probe = plan.means, plan.probe
    work, taken = means.work, probe.import_bytes + probe.peak_bytes
    again = ", activations computed twice" if work.checkpointing else ""
    several = f", {means.processes} processes" if means.processes > 1 else ""
    return [
        *lines,
        f"computed  on {means.device} in {means.dtype}, {work.micro_rows} rows at once{again}{several}",
        f"memory    {format_bytes(taken)} measured, {format_bytes(means.need.total)} estimated, "
        f"{format_bytes(means.free_bytes)} free",
        f"time      {probe.seconds_per_step:.2f} s a step, {duration(plan.seconds or 0.0)} in all",
    ]


def plan_json(training: Training, plan: TrainingPlan) -> dict[str, object]:
    means, probe = plan.means, plan.probe
    return {
        "recipe": training.name,
        "fingerprint": training.fingerprint,
        "engine": training.recipe.engine,
        "base": training.base.name,
        "base_sha256": training.base.tensors_sha256,
        "data": asdict(plan.data.facts),
        "steps": plan.length.steps,
        "steps_done": training.steps_done,
        "epochs": plan.length.epochs,
        "cut_by_budget": plan.length.cut,
        "tokens_per_step": training.recipe.train.batch * training.recipe.train.n_ctx,
        "trained_parameters": probe.trained_parameters if probe else None,
        "device": means.device if means else None,
        "dtype": means.dtype if means else None,
        "processes": means.processes if means else None,
        "micro_batch": means.work.micro_rows if means else None,
        "gradient_checkpointing": means.work.checkpointing if means else None,
        "estimated_bytes": {**asdict(means.need), "total": means.need.total} if means else None,
        "measured_bytes": probe.import_bytes + probe.peak_bytes if probe else None,
        "free_bytes": means.free_bytes if means else None,
        "seconds_per_step": probe.seconds_per_step if probe else None,
        "tokens_per_second": probe.tokens_per_second if probe else None,
        "seconds": plan.seconds,
    }


def result_table(found: Results) -> Table:
    """The figures that an adapter is judged by, before and after."""
    quality, training = found.noted["quality"], found.noted["training"]
    rows: list[Sequence[str]] = []
    if quality["perplexity_after"] is not None:
        rows.append(("perplexity on held-out text", *_pair(quality["perplexity_before"], quality["perplexity_after"])))
    if training["held_out_before"] is not None:
        held = training["held_out_before"], training["held_out_after"]
        rows.append(("held-out loss (nats a learned token)", *(f"{loss:.3f}" for loss in held)))
    rows.append(("drift on unrelated text (mean KLD)", "0", f"{quality['drift_kld']:.4f}"))
    rows.append(("the same likeliest token there", "100%", f"{quality['same_top']:.1%}"))
    return ("", "before", "after"), rows


def result_lines(found: Results) -> list[str]:
    """What there is now, and how it is used."""
    made = [found.adapter, *(path for ending in BESIDE.values() if (path := found.beside(ending)).exists())]
    if "merged" in found.noted:
        made.append(found.noted["merged"])
        use = f"python -m runtime chat {shown([found.noted['merged']])}"
    else:
        use = f"python -m runtime chat {shown([found.noted['base']['path']])} --lora {shown([found.adapter])}"
    return [*(f"{path}" for path in made), f"use it: {use}"]


def result_json(training: Training, found: Results) -> dict[str, Any]:
    noted = found.noted
    return {
        "recipe": training.name,
        "adapter": str(found.adapter),
        "bytes": noted["bytes"],
        "sha256": noted["sha256"],
        "merged": noted.get("merged"),
        "base": noted["base"]["path"],
        "base_sha256": noted["base"]["tensors_sha256"],
        **noted["quality"],
        **{name: noted["training"][name] for name in _TRAINING},
        "seconds": noted["seconds"],
        "files": {key: str(path) for key, ending in BESIDE.items() if (path := found.beside(ending)).exists()},
        "fingerprint": noted["fingerprint"],
        "reused": found.reused,
    }


def merged_table(made: MergedModel) -> Table:
    """File, size, and how far it is from what it was merged of."""
    gate = made.gate
    row = (made.path.name, format_bytes(made.bytes), f"{made.bits_per_weight:.2f}", f"{gate.mean_kld:.4f}")
    columns = ("file", "size", "bits/weight", f"mean KLD from {gate.reference}", "same token", "made in")
    seconds = f"{made.seconds:.1f} s" + (" (earlier)" if made.reused else "")
    return columns, [(*row, f"{gate.same_top:.1%}", seconds)]


def merged_json(made: MergedModel) -> dict[str, object]:
    return {
        "path": str(made.path),
        "type": made.type,
        "bytes": made.bytes,
        "sha256": made.sha256,
        "bits_per_weight": made.bits_per_weight,
        **asdict(made.gate),
        "seconds": made.seconds,
        "reused": made.reused,
    }


_TRAINING = (
    *("tokens_per_second", "seconds_per_step", "steps", "trained_parameters", "held_out_before", "held_out_after"),
    *("weight_bytes", "import_bytes", "peak_bytes"),
)


def _share(facts: Any) -> str:
    return f"{facts.learned_tokens / max(1, facts.tokens):.0%}"


def _trained(plan: TrainingPlan) -> str:
    return f": {plan.probe.trained_parameters:,} parameters" if plan.probe else ""


def _left_out(facts: Any) -> list[str]:
    said = [
        (facts.cut, "examples lost their end: they are longer than train.n_ctx"),
        (facts.dropped, "examples hold nothing to learn within train.n_ctx"),
        (facts.leaked, "examples stand in the held-out file too"),
    ]
    return [f"{count:,} {what}" for count, what in said if count]


def _pair(before: float, after: float) -> tuple[str, str]:
    return f"{before:.2f}", f"{after:.2f} ({after / before - 1:+.0%})"
