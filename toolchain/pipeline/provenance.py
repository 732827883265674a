"""The JSON sidecar of an artifact: where it came from, how it was made, what it is worth.

``X.gguf.json`` lies beside ``X.gguf``. It is taken away before the file is replaced and written after, so a
sidecar never speaks of another file; a file without one is not trusted and made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.base import files
from toolchain.base.command import shown
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import read_header
from toolchain.pipeline.plan import Plan, Step

FORMAT = 1


def sidecar_path(artifact: Path) -> Path:
    return artifact.with_name(artifact.name + ".json")


def read_sidecar(artifact: Path) -> dict[str, object]:
    """The sidecar's content; empty when there is none that can be read."""
    noted = files.read_json(sidecar_path(artifact))
    return noted if isinstance(noted, dict) and noted.get("format") == FORMAT else {}


def describe(plan: Plan, step: Step, made: Path, *, seconds: float, figures: Mapping[str, object]) -> dict[str, object]:
    """The sidecar of ``made``, which is about to become ``step.output``."""
    upstream = [plan.step(need) for need in _ancestors(plan, step)]
    return {
        "format": FORMAT,
        "file": step.output.name,
        "bytes": made.stat().st_size,
        "sha256": files.sha256_file(made),
        "fingerprint": step.fingerprint,
        **figures,
        "seconds": round(seconds, 2),
        "source": {
            "kind": plan.source.kind,
            "name": plan.source.name,
            "commit": plan.source.commit,
            "files": {f.name: f.sha256 for f in plan.source.snapshot.files} if plan.source.snapshot else None,
            "digest": plan.source.digest or None,
        },
        "toolchain": {
            "id": plan.toolchain.id,
            "llama_cpp": plan.toolchain.commit,
            "source": plan.toolchain.source,
            "options": plan.toolchain.options,
            "compilers": plan.toolchain.compilers,
        },
        "recipe": {"name": plan.recipe.name, "sha256": plan.recipe_digest},
        "commands": [shown(s.stage.command(s.output)) for s in (*upstream, step)],
    }


def is_current(step: Step) -> bool:
    """Whether the artifact is there, of this fingerprint, and has the hash that its sidecar states."""
    noted = read_sidecar(step.output)
    if noted.get("fingerprint") != step.fingerprint or not step.output.is_file():
        return False
    return files.known_sha256(step.output) == noted.get("sha256")


def place(made: Path, step: Step, sidecar: Mapping[str, object]) -> None:
    """Put ``made`` under its final name, then its sidecar."""
    sidecar_path(step.output).unlink(missing_ok=True)
    files.promote(made, step.output)
    files.write_json(sidecar_path(step.output), sidecar)


def add_quality(artifact: Path, quality: Mapping[str, object]) -> None:
    """Write what the evaluation found into the sidecar, when it does not stand there already."""
    noted = read_sidecar(artifact)
    if noted and noted.get("quality") != quality:
        files.write_json(sidecar_path(artifact), {**noted, "quality": quality})


def verify(artifact: Path) -> dict[str, object]:
    """Check the header, the size and the SHA-256 of ``artifact``, all read anew; its sidecar.

    Raises ArtifactError for what does not agree, UsageError when there is no sidecar to compare with.
    """
    noted, again = read_sidecar(artifact), "make it again: run its recipe, which replaces it"
    if not noted:
        there = sidecar_path(artifact).exists()
        raise UsageError(
            f"{artifact} has no sidecar{' that can be read' if there else ''} to verify it against",
            evidence=f"looked for {sidecar_path(artifact)}",
            hint="files made by `./inv quantize` have one; run the recipe again",
        )
    if not artifact.is_file():
        raise UsageError(f"{artifact} is gone", evidence=f"{sidecar_path(artifact)} is there", hint=again)
    found = files.sha256_file(artifact)
    if found != noted["sha256"]:
        raise ArtifactError(
            f"{artifact} is not the file that was made",
            evidence=f"expected sha256 {noted['sha256']}, {noted['bytes']} bytes\n"
            f"found    sha256 {found}, {artifact.stat().st_size} bytes",
            hint=again,
        )
    read_header(artifact)
    return noted


def _ancestors(plan: Plan, step: Step) -> list[str]:
    """Ids of all steps that ``step`` builds on, in the plan's order."""
    wanted = set(step.needs)
    for earlier in reversed(plan.steps):
        if earlier.id in wanted:
            wanted.update(earlier.needs)
    return [s.id for s in plan.steps if s.id in wanted]
