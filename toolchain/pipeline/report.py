"""A Plan or an Outcome as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.base.command import shown
from toolchain.base.console import format_bytes
from toolchain.pipeline.execute import Artifact, Outcome
from toolchain.pipeline.plan import Plan, Step

Table = tuple[Sequence[str], list[Sequence[str]]]


def outcome_table(outcome: Outcome) -> Table:
    """File, size, bits per weight, perplexity and seconds of each artifact."""
    return (
        ("file", "size", "bits/weight", "perplexity", "made in"),
        [
            (
                artifact.path.name,
                format_bytes(artifact.bytes),
                f"{artifact.bits_per_weight:.2f}",
                "-" if artifact.perplexity is None else f"{artifact.perplexity:.2f}",
                f"{artifact.seconds:.1f} s" + (" (earlier)" if artifact.reused else ""),
            )
            for artifact in outcome.artifacts
        ],
    )


def outcome_json(plan: Plan, outcome: Outcome) -> dict[str, object]:
    return {
        "recipe": plan.recipe.name,
        "artifacts": [_artifact_json(artifact) for artifact in outcome.artifacts],
        "steps": [{"id": s.id, "seconds": round(s.seconds, 3), "reused": s.reused} for s in outcome.steps],
    }


def _artifact_json(artifact: Artifact) -> dict[str, object]:
    return {
        "path": str(artifact.path),
        "type": artifact.type,
        "bytes": artifact.bytes,
        "sha256": artifact.sha256,
        "bits_per_weight": artifact.bits_per_weight,
        "perplexity": artifact.perplexity,
        "reused": artifact.reused,
    }


def plan_json(plan: Plan, todo: Sequence[Step]) -> dict[str, object]:
    return {
        "recipe": plan.recipe.name,
        "source": {"kind": plan.source.kind, "name": plan.source.name, "commit": plan.source.commit},
        "steps": [
            {
                "id": step.id,
                "command": list(step.stage.command(step.output)),
                "output": str(step.output),
                "bytes": step.stage.bytes,
                "ram_bytes": step.stage.ram_bytes,
                "reused": step not in todo,
            }
            for step in plan.steps
        ],
        "peak_disk_bytes": peak_disk(todo),
        "peak_ram_bytes": peak_ram(todo),
    }


def plan_lines(plan: Plan, todo: Sequence[Step]) -> list[str]:
    """A line and a command for every step, then the sums."""
    lines = []
    for step in plan.steps:
        state = f"writes about {format_bytes(step.stage.bytes)}" if step in todo else "is there already"
        lines += [f"{step.id}: {state}", f"    {shown(step.stage.command(step.output))}"]
    lines.append(f"{len(todo)} of {len(plan.steps)} steps to run")
    lines.append(f"peak disk: about {format_bytes(peak_disk(todo))}; peak memory: about {format_bytes(peak_ram(todo))}")
    return lines


def peak_disk(todo: Sequence[Step]) -> int:
    """Bytes that the missing steps add: what each writes stays until `inv clean`."""
    return sum(step.stage.bytes for step in todo)


def peak_ram(todo: Sequence[Step]) -> int:
    """Bytes of the step that needs most; steps run one after another."""
    return max((step.stage.ram_bytes for step in todo), default=0)
