"""The perplexity stage around a tool that is a script on disk: its figure may be missing, its corpus too short."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.base.errors import ArtifactError, CommandError, FoundryError, UsageError
from toolchain.stages.evaluate import Evaluate

LOST = "echo 'perplexity: calculating perplexity over 8 chunks'; printf '[1]382.1,[2]265.7,'"
WHOLE = f"{LOST}; echo; echo 'Final estimate: PPL = 76.5213 +/- 0.91'"
SHORT = "echo 'perplexity: you need at least 1024 tokens to evaluate perplexity with a context of 512'"


def stage(tmp_path: Path, does: str) -> Evaluate:
    tool = tmp_path / "llama-perplexity"
    tool.write_text(f"#!/bin/sh\n{does}\n")
    tool.chmod(0o755)
    return Evaluate(
        model=tmp_path / "m.gguf",
        label="Q4_K_M",
        corpus=tmp_path / "c.txt",
        n_ctx=512,
        chunks=None,
        model_bytes=0,
        tool=tool,
        toolchain_id="t",
    )


def test_the_figure_and_the_progress_are_what_the_tool_says(tmp_path: Path) -> None:
    judged = stage(tmp_path, WHOLE)
    seen: list[tuple[int, int]] = []
    judged.run(tmp_path / "out.json", log=tmp_path / "log", on_progress=lambda *pair: seen.append(pair))
    assert judged.check(tmp_path / "out.json")["perplexity"] == 76.5213
    assert seen[-1] == (2, 8)


@pytest.mark.parametrize(
    ("does", "error", "words"),
    [
        (LOST, ArtifactError, "gave no figure for Q4_K_M"),
        (SHORT, UsageError, "too short"),
        (f"{LOST}; exit 3", CommandError, "judging Q4_K_M: llama-perplexity ended with status 3"),
    ],
    ids=["no figure", "too short", "failed"],
)
def test_no_figure_at_all_is_an_error(tmp_path: Path, does: str, error: type[FoundryError], words: str) -> None:
    with pytest.raises(error, match=words):
        stage(tmp_path, does).run(tmp_path / "out.json", log=tmp_path / "log", on_progress=lambda *_: None)


@pytest.mark.parametrize(
    "said",
    [
        *(f"Final estimate: PPL = {value} +/- 0.1" for value in ("nan", "inf", "0.5")),
        "Final estimate: PPL = 4096.0000 +/- 0.00007",
        "[1]4096.0001,[2]4096.0001,\\n0.01 E Unexpected negative standard deviation of log(prob)",
    ],
)
def test_a_figure_that_is_no_perplexity_is_refused(tmp_path: Path, said: str) -> None:
    """The last two are those of a model whose logits are all nan."""
    judged = stage(tmp_path, f"printf '{said}\\n'")
    judged.run(tmp_path / "out.json", log=tmp_path / "log", on_progress=lambda *_: None)
    with pytest.raises(ArtifactError, match="does not compute"):
        judged.check(tmp_path / "out.json")
