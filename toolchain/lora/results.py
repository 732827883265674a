"""What a training leaves in ``models/NAME/``, and its sidecar, which tells later runs that it is there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from toolchain.base import files
from toolchain.base.errors import UsageError
from toolchain.lora.curve import draw_curve, read_curve
from toolchain.lora.data.prepare import Prepared
from toolchain.lora.engines import ADAPTER_GGUF, finished
from toolchain.lora.fingerprint import PACKAGES
from toolchain.lora.forms.adapter import read_adapter, write_adapter
from toolchain.lora.judging.judge import Judgement
from toolchain.lora.judging.replies import as_markdown
from toolchain.lora.spec import ADAPTER, METRICS, OUTCOME, TrainOutcome
from toolchain.lora.training import Training
from toolchain.pipeline import provenance
from toolchain.pipeline.execute import MANIFEST
from toolchain.stages.stage import package_version

REFUSED: Final = "refused"
"""Folder in ``models/NAME/`` of an adapter that did not pass its check."""
BESIDE: Final = {"curve": "-loss.png", "metrics": "-loss.jsonl", "replies": "-replies.md", "peft": "-peft"}
"""What lies beside an adapter: its name in `--json`, and how its file's name ends."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What stands in ``models/NAME/``; ``noted`` is the adapter's sidecar. ``reused``: nothing was done for it now."""

    adapter: Path
    noted: Mapping[str, Any]
    reused: bool

    def beside(self, ending: str) -> Path:
        """NAME-loss.png and the like."""
        return self.adapter.with_name(self.adapter.name.removesuffix("-lora.gguf") + ending)


def current(training: Training) -> Results | None:
    """The results, when they are those of this very training, judged as the recipe asks, by a model still there."""
    found = trained(training)
    if found is None or found.noted.get("judged_by") != training.judged_by:
        return None
    return found if "merged" not in found.noted or Path(found.noted["merged"]).is_file() else None


def trained(training: Training) -> Results | None:
    """The results of this very training, however judged, when the file is the one that was made."""
    noted = _noted(training)
    return Results(adapter=training.adapter, noted=noted, reused=True) if noted else None


def refuse_other_base(training: Training) -> None:
    """UsageError when the folder belongs to a quantization recipe or to an adapter of another base."""
    again = f"give the recipe another name, or delete {training.folder}"
    if (training.folder / MANIFEST).exists():
        raise UsageError(f"{training.folder} holds the files of a quantization recipe of the same name", hint=again)
    match provenance.read_sidecar(training.adapter).get("base"):
        case {"origin": str(origin), "tensors_sha256": str(found)} if (
            found != training.base.tensors_sha256 and origin != training.base.origin
        ):
            raise UsageError(
                f"{training.folder} holds an adapter of another base",
                evidence=f"its base is {origin}, this recipe's is {training.base.origin}",
                hint=again,
            )


def take_back(training: Training) -> None:
    """Bring a placed adapter back to where it was trained, when `inv clean` took that: it may be judged anew then."""
    noted = _noted(training)
    if not noted or finished(training.run_dir):
        return
    _copy(training.adapter, training.run_dir / ADAPTER_GGUF)
    peft, curve = training.folder / f"{training.name}-peft", training.folder / f"{training.name}-loss.jsonl"
    if peft.is_dir():
        _copy(peft, training.run_dir / ADAPTER)
    if curve.is_file():
        _copy(curve, training.run_dir / METRICS)
    files.write_json(training.run_dir / OUTCOME, noted["training"])


def with_notes(training: Training) -> Path:
    """The trained adapter under its own name and with its notes, beside the work: the bytes that ``place`` copies."""
    path = training.run_dir / training.adapter.name
    trained_one = read_adapter(training.run_dir / ADAPTER_GGUF)
    with files.disk_errors(path), files.staged(path) as partial:
        write_adapter(partial, replace(trained_one, name=f"{training.name} adapter", notes=_notes(training)))
    return path


def place(
    training: Training,
    data: Prepared,
    outcome: TrainOutcome,
    found: Judgement,
    *,
    adapter: Path,
    merged: Path | None,
    folder: Path,
) -> Results:
    """Write all results into ``folder``, the adapter's sidecar last. ``adapter`` is what ``with_notes`` made,
    ``merged`` the model that was judged in place of base and adapter, if it was.
    """
    run_dir, name = training.run_dir, training.name
    results = Results(adapter=folder / training.adapter.name, noted={}, reused=False)
    sidecar = provenance.sidecar_path(results.adapter)
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sidecar.unlink(missing_ok=True)
        _copy(adapter, results.adapter)
        if (run_dir / ADAPTER).is_dir():
            _copy(run_dir / ADAPTER, results.beside("-peft"))
        if (run_dir / METRICS).is_file():
            _copy(run_dir / METRICS, results.beside("-loss.jsonl"))
            curve = read_curve(run_dir / METRICS)
            draw_curve(curve, outcome, results.beside("-loss.png"), title=f"{name} on {training.base.name}")
        results.beside("-replies.md").unlink(missing_ok=True)
        if found.replies:
            text = as_markdown(found.replies, title=f"{training.base.name} before and after {results.adapter.name}")
            results.beside("-replies.md").write_text(text, encoding="utf-8")
        noted = _described(training, data, outcome, found, results.adapter)
        noted |= {"merged": str(merged)} if merged else {}
        files.write_json(sidecar, noted)
    if folder == training.folder:
        files.remove(folder / REFUSED, within=folder)
    return replace(results, noted=noted)


def distrust(training: Training) -> None:
    """Let the adapter that is there count for nothing; it stays until a new one takes its place."""
    provenance.sidecar_path(training.adapter).unlink(missing_ok=True)


def withdraw(training: Training) -> None:
    """Take an adapter that fails its check now, with all that was made of it, away from the final names."""
    distrust(training)
    training.adapter.unlink(missing_ok=True)
    for ending in BESIDE.values():
        files.remove(training.folder / f"{training.name}{ending}", within=training.folder)


def moved(merged: Path, folder: Path) -> Path:
    """Bring a merged model and its sidecar to ``folder``; where it is then."""
    final = folder / merged.name
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        merged.replace(final)
        provenance.sidecar_path(merged).replace(provenance.sidecar_path(final))
    return final


def quality(found: Judgement) -> dict[str, object]:
    """The figures of a judgement, as the sidecar and `--json` have them."""
    return {
        "perplexity_before": found.before.value if found.before else None,
        "perplexity_after": found.after.value if found.after else None,
        "perplexity_error": found.after.error if found.after else None,
        "n_ctx": found.after.n_ctx if found.after else None,
        "drift_kld": found.drift.mean_kld,
        "drift_error": found.drift.error,
        "same_top": found.drift.same_top,
    }


def _noted(training: Training) -> dict[str, Any]:
    """The sidecar of this very training, when the file that it speaks of is there; else nothing."""
    noted = provenance.read_sidecar(training.adapter)
    if noted.get("fingerprint") != training.fingerprint or not training.adapter.is_file():
        return {}
    return noted if files.known_sha256(training.adapter) == noted.get("sha256") else {}


def _notes(training: Training) -> dict[str, str]:
    """What the header tells of its making, as ``foundry.*`` keys."""
    return {"recipe": training.name, "engine": training.recipe.engine, "llama_cpp": training.engine.commit}


def _described(
    training: Training, data: Prepared, outcome: TrainOutcome, found: Judgement, adapter: Path
) -> dict[str, Any]:
    base, build = training.base, training.engine
    return {
        "format": provenance.FORMAT,
        "kind": "adapter",
        "file": adapter.name,
        "bytes": adapter.stat().st_size,
        "sha256": files.sha256_file(adapter),
        "fingerprint": training.fingerprint,
        "judged_by": training.judged_by,
        "seconds": round(outcome.seconds_per_step * outcome.steps, 2),
        "base": {
            "name": base.name,
            "origin": base.origin,
            "path": str(base.path),
            "tensors_sha256": base.tensors_sha256,
        },
        "data": asdict(data.facts),
        "training": asdict(outcome),
        "versions": {name: package_version(name) for name in PACKAGES} if training.recipe.engine == "torch" else {},
        "toolchain": {
            "id": build.id,
            "llama_cpp": build.commit,
            "source": build.source,
            "options": build.options,
            "compilers": build.compilers,
        },
        "recipe": {"name": training.name, "sha256": files.sha256_text(training.recipe.model_dump_json())},
        "quality": quality(found),
    }


def _copy(source: Path, final: Path) -> None:
    with files.staged(final) as partial:
        if source.is_dir():
            shutil.copytree(source, partial)
        else:
            shutil.copyfile(source, partial)
