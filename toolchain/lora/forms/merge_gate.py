"""Does a merged model do what base and adapter do? Told in nats a token, and bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import files
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError
from toolchain.base.gguf import GgufHeader
from toolchain.build.toolchain import Toolchain
from toolchain.lora.forms.ggml_values import GgmlValues
from toolchain.lora.forms.merged_weights import EXACT, Scaled, changed_tensors, write_merged
from toolchain.lora.forms.rewrite import rewritten_bytes
from toolchain.lora.judging.drift import Judged as Model
from toolchain.lora.judging.drift import drift


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read to judge: windows of ``n_ctx`` tokens of ``path``, at most ``chunks``."""

    path: Path
    n_ctx: int
    chunks: int | None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """``mean_kld`` (± ``error``, nats a token) and ``same_top`` of the merged model against ``reference``.

    That is base and adapter at run time or, where no runtime applies all of the adapter, their unrounded sum.
    ``quantization_kld`` is what the base's own quantization costs against its full-precision source, where that is at
    hand: the scale to read the other by.
    """

    mean_kld: float
    error: float
    same_top: float
    reference: str
    quantization_kld: float | None


def hold_against(
    merged: Path,
    base: Sequence[GgufHeader],
    adapters: Sequence[tuple[Path, Scaled]],
    text: Text,
    *,
    full: Path | None,
    values: GgmlValues,
    toolchain: Toolchain,
    log: Path,
    on_progress: OnProgress = lambda *_: None,
) -> Gate:
    """How far ``merged`` is from what it was merged of, on ``text``; an unrounded sum may lie beside it meanwhile."""

    def far(reference: Model, other: Model) -> tuple[float, float, float]:
        found = drift(
            reference,
            other,
            text.path,
            n_ctx=text.n_ctx,
            chunks=text.chunks,
            toolchain=toolchain,
            log=log,
            on_progress=on_progress,
        )
        return found.mean_kld, found.error, found.same_top

    expected = far((full, None), (base[0].path, None))[0] if full else None
    with _reference(merged, base, adapters, values) as (reference, words):
        mean_kld, error, same_top = far(reference, (merged, None))
    return Gate(mean_kld=mean_kld, error=error, same_top=same_top, reference=words, quantization_kld=expected)


def require_close(gate: Gate, most: float, name: str) -> None:
    """ArtifactError when the merged model ``name`` is further from its reference than ``most``."""
    if gate.mean_kld <= most:
        return
    own = "" if gate.quantization_kld is None else f"\nthe base's own quantization costs {gate.quantization_kld:.4f}"
    raise ArtifactError(
        f"{name} is too far from {gate.reference}",
        evidence=f"mean KL divergence {gate.mean_kld:.4f} ± {gate.error:.4f}, at most {most:g} (merge.max_mean_kld)\n"
        f"the same likeliest token in {gate.same_top:.1%} of the places{own}",
        hint="merge into a larger type (merge.type: Q8_0), or raise merge.max_mean_kld knowing that",
    )


@contextmanager
def _reference(
    merged: Path, base: Sequence[GgufHeader], adapters: Sequence[tuple[Path, Scaled]], values: GgmlValues
) -> Iterator[tuple[Model, str]]:
    scaled = [one for _, one in adapters]
    if len(scaled) == 1 and scaled[0].scale == 1 and not scaled[0].adapter.dora and not scaled[0].adapter.norms:
        yield (base[0].path, adapters[0][0]), "base and adapter at run time"
        return
    exact = merged.with_name("exact.gguf")
    types = dict.fromkeys(changed_tensors(base, scaled), EXACT)
    files.require_free(exact, rewritten_bytes(base, types), "the unrounded sum to judge by")
    write_merged(base, scaled, exact, types=types, values=values, notes={})
    try:
        yield (exact, None), "the unrounded sum of base and adapter"
    finally:
        exact.unlink()
