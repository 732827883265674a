"""How far one model is from another on a text: KL divergence of their next-token distributions, by llama-perplexity.

The reference writes its distributions to a file (16 bits for each token of the vocabulary, clipped 16 nats below the
highest: log_softmax in tools/perplexity/perplexity.cpp), the other reads it. The file is bounded, and gone at the end.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from toolchain.base import files
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import read_header
from toolchain.base.gguf_header import StringArray
from toolchain.build.toolchain import Toolchain
from toolchain.lora.judging.evaluate import (
    SMALLEST_WINDOW,
    Perplexity,
    adapter_argv,
    final_perplexity,
    in_windows,
    name_of,
    scored_in,
    tokens_needed,
)
from toolchain.stages.evaluate import FINAL, TooShort, ask, is_perplexity, perplexity_argv

Judged: TypeAlias = tuple[Path, Path | None]
"""A model and the adapter on top of it."""

MOST_BYTES: Final = 1 << 30
"""Of the reference's distributions: 4,000 tokens of a vocabulary of 128,000."""
LEAST_TOKENS: Final = 100
"""llama-perplexity tells no statistics on fewer (kl_divergence in perplexity.cpp)."""

_NUMBER: Final = r"\s*(-?(?:[\d.]+|nan|inf))"
_FIGURES: Final[Mapping[str, str]] = {
    "perplexity": rf"Mean PPL\(Q\)\s*:{_NUMBER}",
    "deviation": rf"Mean PPL\(Q\)\s*:{_NUMBER}\s*±{_NUMBER}",
    "mean_kld": rf"Mean\s+KLD:{_NUMBER}",
    "error": rf"Mean\s+KLD:{_NUMBER}\s*±{_NUMBER}",
    "median_kld": rf"Median\s+KLD:{_NUMBER}",
    "kld_99": rf"99\.0%\s+KLD:{_NUMBER}",
    "max_kld": rf"Maximum\s+KLD:{_NUMBER}",
    "same_top": rf"Same top p:{_NUMBER}",
}
_LAST: Final = re.compile(_FIGURES["same_top"])
_HEAD: Final = struct.Struct("<8s3i")
"""Of the file: ``_logits_``, window, vocabulary, windows."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """KL divergences in nats a token, of the other from the reference; the same model again shows about 1e-6, of either
    sign, by the 16 bits of the file. ``error`` is one standard error of ``mean_kld``.

    ``same_top`` is the share of tokens whose likeliest successor is the same. ``tokens`` were judged, in windows of
    ``n_ctx``; both perplexities are of them.
    """

    mean_kld: float
    error: float
    median_kld: float
    kld_99: float
    max_kld: float
    same_top: float
    perplexity_reference: float
    perplexity: float
    n_ctx: int
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        """Other over reference."""
        return self.perplexity / self.perplexity_reference


def drift(
    reference: Judged,
    other: Judged,
    text: Path,
    *,
    n_ctx: int,
    toolchain: Toolchain,
    log: Path,
    chunks: int | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> Drift:
    """How far ``other`` is from ``reference`` on ``text``, in at most ``chunks`` windows of ``n_ctx`` tokens.

    There are fewer where their distributions would take more than MOST_BYTES, and shorter ones on a short text. One of
    the same ``log`` runs at a time, and takes away what a killed one left. Raises UsageError when the text is too short
    or the vocabularies differ, MissingError when the disk is full.
    """
    n_vocab = _one_vocabulary(reference[0], other[0])
    tool = toolchain.tool("perplexity")
    # Not by the models: a merged one is judged under a name of the moment, and what a kill left would never be found.
    final = files.home_dir("work") / "drift" / f"{files.sha256_text(str(log))[:20]}.logits"
    with files.locked(final.with_suffix(".lock")), files.staging(final) as logits, files.disk_errors(final):

        def written(window: int) -> str:
            most = _most_windows(window, n_vocab, chunks)
            bound = min(most, 1 + text.stat().st_size // window)  # a token has a byte at least
            files.require_free(logits, bound * _window_bytes(window, n_vocab), "the distributions of the reference")
            argv = perplexity_argv(tool, reference[0], text, n_ctx=window, chunks=most)
            argv = (*argv, *adapter_argv(reference[1]), "--kl-divergence-base", str(logits))
            said = ask(argv, FINAL, label=name_of(*reference), log=log, on_progress=on_progress)
            windows = _windows_written(logits, window, n_vocab)
            if windows * scored_in(window) < LEAST_TOKENS:
                raise TooShort(f"about {windows * window} are given", None)
            return said

        said, window = in_windows(written, _fitting(n_ctx, n_vocab), text, least_scored=LEAST_TOKENS)
        before = final_perplexity(said, window, name_of(*reference))
        argv = perplexity_argv(tool, other[0], text, n_ctx=window, chunks=None)
        argv = (*argv, *adapter_argv(other[1]), "--kl-divergence", "--kl-divergence-base", str(logits))
        told = ask(argv, _LAST, label=name_of(*other), log=log, on_progress=on_progress)
        tokens = _windows_written(logits, window, n_vocab) * scored_in(window)
    return _parsed(told, before, tokens, name_of(*other))


def _parsed(told: str, before: Perplexity, tokens: int, label: str) -> Drift:
    """The statistics that --kl-divergence printed. The reference's perplexity is its own run's: the one printed here is
    of the clipped distributions, and too low where a text surprises.
    """
    found = {name: re.search(pattern, told) for name, pattern in _FIGURES.items()}
    if lost := [name for name, match in found.items() if match is None]:
        raise ArtifactError(
            f"llama-perplexity told no {', '.join(lost)} of {label}",
            evidence=told[-2000:],
            hint="type the same command again; if it stays so, report it with this text",
        )
    figures = {name: float(match[match.lastindex or 1]) for name, match in found.items() if match}
    computes = is_perplexity(figures["perplexity"], figures.pop("deviation"))
    if not (computes and math.isfinite(figures["mean_kld"])):
        raise ArtifactError(
            f"{label} does not compute",
            evidence=f"divergence {figures['mean_kld']}, perplexity {figures['perplexity']}",
            hint="an adapter: train it with a lower train.learning_rate; a model: `./inv verify FILE.gguf`",
        )
    figures["same_top"] /= 100
    return Drift(**figures, perplexity_reference=before.value, n_ctx=before.n_ctx, tokens=tokens)


def _one_vocabulary(reference: Path, other: Path) -> int:
    """How many tokens both know; UsageError when they know different ones."""
    first, second = _tokens(reference), _tokens(other)
    if first != second:
        raise UsageError(
            f"{reference.name} and {other.name} have different vocabularies: their predictions cannot be compared",
            evidence=f"{len(first)} and {len(second)} tokens",
            hint="compare an adapter or a merged model with the base that it was made from",
        )
    return len(first)


def _tokens(model: Path) -> StringArray:
    tokens = read_header(model).metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray):
        raise UsageError(f"{model.name} has no vocabulary", hint="name a whole model's file")
    return tokens


def _fitting(n_ctx: int, n_vocab: int) -> int:
    """``n_ctx``, halved until one window's distributions stay within MOST_BYTES."""
    while n_ctx > SMALLEST_WINDOW and _window_bytes(n_ctx, n_vocab) > MOST_BYTES:
        n_ctx //= 2
    return n_ctx


def _most_windows(window: int, n_vocab: int, chunks: int | None) -> int:
    """Within MOST_BYTES, and at most ``chunks`` of them, but no fewer than the statistics want."""
    within = MOST_BYTES // _window_bytes(window, n_vocab)
    wanted = within if chunks is None else min(chunks, within)
    return max(wanted, tokens_needed(window, LEAST_TOKENS) // window)


def _window_bytes(window: int, n_vocab: int) -> int:
    """On disk: its tokens, and for each that is judged a scale, an offset and 16 bits for each of the vocabulary."""
    return 4 * window + scored_in(window) * 2 * (2 * ((n_vocab + 1) // 2) + 4)


def _windows_written(logits: Path, window: int, n_vocab: int) -> int:
    """How many windows lie in the file, whose size must be theirs: the program does not notice a disk that is full."""
    with logits.open("rb") as file:
        head = file.read(_HEAD.size)
    windows = int(_HEAD.unpack(head)[3]) if len(head) == _HEAD.size else 0
    size, expected = logits.stat().st_size, _HEAD.size + windows * _window_bytes(window, n_vocab)
    if size != expected:
        if files.is_full(logits):
            raise files.disk_full(logits, f"{size} of {expected} bytes were written")
        raise ArtifactError(f"llama-perplexity wrote {size} of {expected} bytes of {logits.name}")
    return windows
