"""Perplexity of a GGUF on a text, by the built llama-perplexity, and how that program is asked at all."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, machine
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError, CommandError, UsageError
from toolchain.stages import perplexity_child
from toolchain.stages.stage import Stage

FINAL = re.compile(
    r"(?:Final estimate: PPL(?:\s*=\s*|\s+over .*?=\s*)|\[\d+\](?=[^\[]*Unexpected negative standard deviation))"
    r"([\d.]+|nan|inf|-nan)(?: \+/- ([\d.]+))?"
)
"""The figure and its error, or that of the last window where a deviation of nothing was rounded below it."""
TOO_SHORT = "you need at least"
TOKENS = re.compile(r"tokenizes to only (\d+) tokens")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Perplexity of ``model`` over ``corpus`` in windows of ``n_ctx`` tokens, at most ``chunks`` of them."""

    model: Path
    label: str
    corpus: Path
    n_ctx: int
    chunks: int | None
    model_bytes: int
    tool: Path
    toolchain_id: str

    @property
    def title(self) -> str:
        return f"perplexity of {self.label}"

    @property
    def bytes(self) -> int:
        return 0

    @property
    def ram_bytes(self) -> int:
        """The weights, and about 1 GiB for the KV cache and the logits of one window."""
        return self.model_bytes + (1 << 30)

    @property
    def identity(self) -> Mapping[str, object]:
        return {"stage": "evaluate", "n_ctx": self.n_ctx, "chunks": self.chunks, "toolchain": self.toolchain_id}

    def command(self, output: Path) -> tuple[str, ...]:
        return perplexity_argv(self.tool, self.model, self.corpus, n_ctx=self.n_ctx, chunks=self.chunks)

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        try:
            said = ask(self.command(output), FINAL, label=self.label, log=log, on_progress=on_progress)
        except TooShort as error:
            raise UsageError(
                f"the evaluation text is too short for windows of {self.n_ctx} tokens",
                evidence=error.evidence,
                hint="give a longer evaluate.corpus, or a smaller evaluate.n_ctx",
            ) from None
        final = FINAL.search(said)
        assert final is not None
        figures = {"perplexity": float(final[1]), "error": float(final[2] or 0), "n_ctx": self.n_ctx}
        output.write_text(json.dumps(figures))

    def check(self, output: Path) -> Mapping[str, object]:
        """The figure is a perplexity of a model that computes."""
        figures: dict[str, float] = json.loads(output.read_text())
        if not is_perplexity(figures["perplexity"], figures["error"]):
            raise ArtifactError(
                f"{self.label} does not compute: its perplexity is {figures['perplexity']}",
                hint="the source weights or this quantization are broken; try another type",
            )
        return figures


class TooShort(UsageError):
    """A text of ``tokens`` tokens (None: it was not told), fewer than the two windows that are needed."""

    def __init__(self, evidence: str, tokens: int | None) -> None:
        super().__init__("the text is too short for two windows", evidence=evidence)
        self.tokens = tokens


def is_perplexity(value: float, error: float) -> bool:
    """Finite, at least 1, and not of logits that are no numbers: llama-perplexity takes every token for equally likely
    then (log_softmax in perplexity.cpp compares with them), which gives the vocabulary's size and no deviation at all.
    """
    return 1 <= value < float("inf") and not (value > 2 and error < 1e-6 * value)


def perplexity_argv(tool: Path, model: Path, text: Path, *, n_ctx: int, chunks: int | None) -> tuple[str, ...]:
    """llama-perplexity of ``model`` over ``text`` in windows of ``n_ctx`` tokens, at most ``chunks`` of them."""
    limit = () if chunks is None else ("--chunks", str(chunks))
    size = ("--ctx-size", str(n_ctx), "--threads", str(machine.probe().compute_threads))
    return (str(tool), "--model", str(model), "--file", str(text), *size, *limit)


def ask(argv: tuple[str, ...], wanted: re.Pattern[str], *, label: str, log: Path, on_progress: OnProgress) -> str:
    """What llama-perplexity says, with ``wanted`` in it. Raises TooShort, and ArtifactError without a figure."""
    tool, what = Path(argv[0]), f"judging {label}"
    through = (sys.executable, "-IS", perplexity_child.__file__) if perplexity_child.library(tool) else ()
    try:
        said = command.run((*through, *argv), what=what, log=log, parse=parse_chunks, on_progress=on_progress).output
    except CommandError as error:
        message = error.message.replace(f"{what}: {Path(sys.executable).name} ", f"{what}: {tool.name} ")
        raise CommandError(message, evidence=error.evidence, hint=error.hint) from error
    if TOO_SHORT in said:
        found = TOKENS.search(said)
        line = next(line for line in said.splitlines() if TOO_SHORT in line)
        raise TooShort(line, int(found[1]) if found else None)
    if not wanted.search(said):
        raise ArtifactError(
            f"llama-perplexity gave no figure for {label}",
            evidence="\n".join(said.splitlines()[-8:]),
            hint=f"read {log}, then run the recipe again",
        )
    return said


def parse_chunks(recent: str) -> tuple[int, int] | None:
    """llama-perplexity prints ``over N chunks`` once and then ``[i]value,`` after each."""
    total = re.search(r"perplexity over (\d+) chunks", recent)
    done = re.findall(r"\[(\d+)\][\d.]+,", recent)
    if not done:
        return None
    return (int(done[-1]), int(total[1]) if total else int(done[-1]))
