"""Perplexity of a GGUF on a text, by the built llama-perplexity."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, machine
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.stages.stage import Stage

FINAL = re.compile(r"Final estimate: PPL(?:\s*=\s*|\s+over .*?=\s*)([\d.]+|nan|inf|-nan)(?: \+/- ([\d.]+))?")
TOO_SHORT = "you need at least"
TRIES = 3
"""llama.cpp's logger is a thread that the end of the program does not wait for (llama.cpp issue 22142): under
load the last lines, and with them the figure, can be lost though all went well. Then we ask again."""


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
        threads = str(machine.probe().compute_threads)
        limit = () if self.chunks is None else ("--chunks", str(self.chunks))
        size = ("--ctx-size", str(self.n_ctx), "--threads", threads)
        return (str(self.tool), "--model", str(self.model), "--file", str(self.corpus), *size, *limit)

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        for _ in range(TRIES):
            said = command.run(
                self.command(output),
                what=f"judging {self.label}",
                log=log,
                parse=parse_chunks,
                on_progress=on_progress,
            ).output
            final = FINAL.search(said)
            if final or TOO_SHORT in said:
                break
        if TOO_SHORT in said:
            raise UsageError(
                f"the evaluation text is too short for windows of {self.n_ctx} tokens",
                evidence=next(line for line in said.splitlines() if TOO_SHORT in line),
                hint="give a longer evaluate.corpus, or a smaller evaluate.n_ctx",
            )
        if not final:
            raise ArtifactError(
                f"llama-perplexity gave no figure for {self.label}",
                evidence="\n".join(said.splitlines()[-8:]),
                hint=f"read {log}, then run the recipe again",
            )
        figures = {"perplexity": float(final[1]), "error": float(final[2] or "nan"), "n_ctx": self.n_ctx}
        output.write_text(json.dumps(figures))

    def check(self, output: Path) -> Mapping[str, object]:
        """The figure is a number that a perplexity can be: finite and at least 1."""
        figures: dict[str, object] = json.loads(output.read_text())
        perplexity = figures["perplexity"]
        if not (isinstance(perplexity, float) and 1 <= perplexity < float("inf")):
            raise ArtifactError(
                f"{self.label} does not compute: its perplexity is {perplexity}",
                hint="the source weights or this quantization are broken; try another type",
            )
        return figures


def parse_chunks(recent: str) -> tuple[int, int] | None:
    """llama-perplexity prints ``over N chunks`` once and then ``[i]value,`` after each."""
    total = re.search(r"perplexity over (\d+) chunks", recent)
    done = re.findall(r"\[(\d+)\][\d.]+,", recent)
    if not done:
        return None
    return (int(done[-1]), int(total[1]) if total else int(done[-1]))
