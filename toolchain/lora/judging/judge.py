"""What an adapter is worth: held-out text, text on which nothing should change, and replies to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.base import console, files
from toolchain.base.errors import ArtifactError
from toolchain.lora.data.prepare import Prepared
from toolchain.lora.judging.drift import Drift, drift
from toolchain.lora.judging.evaluate import Perplexity, perplexity
from toolchain.lora.judging.replies import Replies, replies
from toolchain.lora.training import Training

NOTE = "judged.json"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Perplexities are None without a held-out part. ``drift`` is on the unrelated text."""

    before: Perplexity | None
    after: Perplexity | None
    drift: Drift
    replies: tuple[Replies, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Judgement:
        found = {name: value[name] and Perplexity(**value[name]) for name in ("before", "after")}
        told = tuple(Replies(**one) for one in value["replies"])
        return cls(**found, drift=Drift(**value["drift"]), replies=told)


def judge(training: Training, data: Prepared, model: Path, adapter: Path | None) -> Judgement:
    """``model`` with ``adapter`` (None: a merged model) against the base; kept, and not done again, beside the work."""
    note = training.run_dir / NOTE
    known = files.read_json(note)
    if isinstance(known, dict) and known.get("judged_by") == training.judged_by:
        return Judgement.from_json(known["judgement"])
    asked, base = training.recipe.evaluate, training.base.path
    means: dict[str, Any] = {"n_ctx": asked.n_ctx, "chunks": asked.chunks}
    means |= {"toolchain": training.toolchain, "log": training.log}
    before = after = None
    if data.facts.held_tokens:
        with console.step("perplexity of the base on held-out text") as step:
            before = perplexity(base, data.held_text, on_progress=step.advance, **means)
            step.note = f"{before.value:.2f}"
        with console.step("perplexity with the adapter") as step:
            after = perplexity(model, data.held_text, adapter=adapter, on_progress=step.advance, **means)
            step.note = f"{after.value:.2f}"
    with console.step("drift on unrelated text") as step:
        moved = drift((base, None), (model, adapter), training.unrelated, on_progress=step.advance, **means)
        step.note = f"mean KLD {moved.mean_kld:.4f}"
    told: tuple[Replies, ...] = ()
    if asked.prompts:
        with console.step("replies side by side"):
            told = replies(asked.prompts, base, adapter, n=asked.reply_tokens, log=training.log, merged=model)
    found = Judgement(before=before, after=after, drift=moved, replies=told)
    files.write_json(note, {"judged_by": training.judged_by, "judgement": asdict(found)})
    return found


def require_little_drift(found: Drift, most: float | None, *, kept: Path) -> None:
    """ArtifactError when the drift is larger than the recipe allows; the files are in ``kept`` then."""
    if most is None or found.mean_kld <= most:
        return
    raise ArtifactError(
        f"the adapter changes too much: drift {found.mean_kld:.4f} on unrelated text, at most {most:g} is allowed",
        evidence=f"mean KL divergence {found.mean_kld:.4f} ± {found.error:.4f} nats a token, the same likeliest token "
        f"in {found.same_top:.1%} of the places\nkept for a look: {kept}",
        hint="train fewer steps, at a lower rate or rank, or raise evaluate.max_drift_kld knowing that",
    )
