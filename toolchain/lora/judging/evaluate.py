"""Perplexity of a model with or without an adapter, by the built llama-perplexity.

A held-out text is often small, so the window shrinks until the text has the two windows that llama-perplexity wants.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolchain.base import files
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.build.toolchain import Toolchain
from toolchain.pipeline.recipe import BUILTIN_CORPUS
from toolchain.stages import corpus
from toolchain.stages.evaluate import FINAL, TooShort, ask, is_perplexity, perplexity_argv

SMALLEST_WINDOW: Final = 32
"""Tokens; half of a window is context, and with less of it a perplexity says little."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """``error`` is one standard error of ``value``; ``n_ctx`` the window that was used, tokens."""

    value: float
    error: float
    n_ctx: int


def perplexity(
    model: Path,
    text: Path,
    *,
    n_ctx: int,
    toolchain: Toolchain,
    log: Path,
    chunks: int | None = None,
    adapter: Path | None = None,
    scale: float = 1.0,
    on_progress: OnProgress = lambda *_: None,
) -> Perplexity:
    """Of ``model``, with ``adapter`` at ``scale``, on ``text``, in at most ``chunks`` windows of ``n_ctx`` tokens.

    On a short text the window is a half, a quarter and so on of that. Raises UsageError when the text is too short for
    SMALLEST_WINDOW, ArtifactError when the model does not compute.
    """
    label = name_of(model, adapter)

    def asked(window: int) -> str:
        argv = perplexity_argv(toolchain.tool("perplexity"), model, text, n_ctx=window, chunks=chunks)
        return ask((*argv, *adapter_argv(adapter, scale)), FINAL, label=label, log=log, on_progress=on_progress)

    said, window = in_windows(asked, n_ctx, text)
    return final_perplexity(said, window, label)


def in_windows(asked: Callable[[int], str], n_ctx: int, text: Path, *, least_scored: int = 0) -> tuple[str, int]:
    """(what ``asked`` says to the largest window that suits, that window); ``least_scored`` tokens are to be judged."""
    window, smallest = n_ctx, min(n_ctx, SMALLEST_WINDOW)
    while True:
        try:
            return asked(window), window
        except TooShort as error:
            tokens = error.tokens
            needed = tokens_needed(smallest, least_scored)
            if window // 2 < smallest or (tokens is not None and tokens < needed):
                given = error.evidence if tokens is None else f"{tokens} tokens are given"
                raise UsageError(
                    f"{text.name} is too short to judge by",
                    evidence=f"at least {needed} tokens are needed\n{given}\nfile  {text}",
                    hint="keep more of the data (data.held_out), or name a longer text",
                ) from None
            window //= 2
            while tokens is not None and tokens_needed(window, least_scored) > tokens and window // 2 >= smallest:
                window //= 2


def tokens_needed(window: int, least_scored: int = 0) -> int:
    """Of a text: two windows, and as many as hold ``least_scored`` judged tokens."""
    return window * max(2, -(-least_scored // scored_in(window)))


def scored_in(window: int) -> int:
    """Tokens of a window that are judged: those behind its first half that have a successor (perplexity.cpp)."""
    return window - 1 - window // 2


def final_perplexity(said: str, n_ctx: int, label: str) -> Perplexity:
    """The figure in what llama-perplexity said; ArtifactError unless the model computes."""
    final = FINAL.search(said)
    assert final is not None
    value, error = float(final[1]), float(final[2] or 0)
    if not is_perplexity(value, error):
        raise ArtifactError(
            f"{label} does not compute: its perplexity is {value}",
            hint="an adapter: train it with a lower train.learning_rate; the base: `./inv verify FILE.gguf`",
        )
    return Perplexity(value=value, error=error, n_ctx=n_ctx)


def adapter_argv(adapter: Path | None, scale: float = 1.0) -> tuple[str, ...]:
    """The adapter as llama.cpp's programs take it: in a list with commas, its scale behind a colon (common/arg.cpp)."""
    if adapter is None:
        return ()
    path = str(adapter)
    listed = '"{}"'.format(path.replace('"', '""')) if re.search('[",]', path) else path
    if scale == 1.0:
        return ("--lora", listed)
    if ":" in path:
        raise UsageError(
            "llama.cpp takes no scale for an adapter with a colon in its path", evidence=path, hint="rename it"
        )
    return ("--lora-scaled", f"{listed}:{scale}")


def name_of(model: Path, adapter: Path | None) -> str:
    return f"{model.name} with {adapter.name}" if adapter else model.name


def text_file(named: str, folder: Path) -> Path:
    """The text that a recipe in ``folder`` names; the built-in one is written to FOUNDRY_HOME once."""
    if named == BUILTIN_CORPUS:
        path = files.home_dir("work") / "texts" / f"python-docs-{corpus.corpus_digest('heldout')[:20]}.txt"
        if not path.exists():
            with files.disk_errors(path), files.locked(path.with_name(".lock")), files.staged(path) as partial:
                partial.write_text(corpus.python_docs("heldout"))
        return path
    path = folder / files.expand(named)
    if not path.is_file():
        raise UsageError(f"no such text: {path}", hint=f"evaluate.unrelated is a text file, or {BUILTIN_CORPUS}")
    return path
