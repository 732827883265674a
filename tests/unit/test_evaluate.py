"""The perplexity stage around a tool that is a script on disk: its last lines may be lost, its corpus too short."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.base.errors import ArtifactError, FoundryError, UsageError
from toolchain.stages.evaluate import TRIES, Evaluate

LOST = "echo 'perplexity: calculating perplexity over 8 chunks'; printf '[1]382.1,[2]265.7,'"
WHOLE = f"{LOST}; echo; echo 'Final estimate: PPL = 76.5213 +/- 0.91'"
SHORT = "echo 'perplexity: you need at least 1024 tokens to evaluate perplexity with a context of 512'"


def stage(tmp_path: Path, *runs: str) -> Evaluate:
    """A stage whose tool does each of ``runs`` in turn, then the last one again and again."""
    tool, counter = tmp_path / "llama-perplexity", tmp_path / "runs"
    counter.write_text("")
    cases = "".join(f"{i}) {run} ;;\n" for i, run in enumerate(runs[:-1], start=1))
    tool.write_text(f"#!/bin/sh\necho x >> {counter}\ncase $(wc -l < {counter}) in\n{cases}*) {runs[-1]} ;;\nesac\n")
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


def times_run(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().split())


@pytest.mark.parametrize("lost", [0, 1, TRIES - 1])
def test_a_figure_that_was_lost_is_asked_for_again(tmp_path: Path, lost: int) -> None:
    judged = stage(tmp_path, *[LOST] * lost, WHOLE)
    seen: list[tuple[int, int]] = []
    judged.run(tmp_path / "out.json", log=tmp_path / "log", on_progress=lambda *pair: seen.append(pair))
    assert judged.check(tmp_path / "out.json")["perplexity"] == 76.5213
    assert times_run(tmp_path) == lost + 1
    assert seen[-1] == (2, 8)


@pytest.mark.parametrize(
    ("run", "runs", "error"), [(LOST, TRIES, ArtifactError), (SHORT, 1, UsageError)], ids=["lost", "too short"]
)
def test_no_figure_at_all_is_an_error(tmp_path: Path, run: str, runs: int, error: type[FoundryError]) -> None:
    with pytest.raises(error) as caught:
        stage(tmp_path, run).run(tmp_path / "out.json", log=tmp_path / "log", on_progress=lambda *_: None)
    assert times_run(tmp_path) == runs
    assert caught.value.hint


@pytest.mark.parametrize("value", ["nan", "inf", "0.5"])
def test_a_figure_that_is_no_perplexity_is_refused(tmp_path: Path, value: str) -> None:
    judged = stage(tmp_path, f"echo 'Final estimate: PPL = {value} +/- 0.1'")
    judged.run(tmp_path / "out.json", log=tmp_path / "log", on_progress=lambda *_: None)
    with pytest.raises(ArtifactError, match="does not compute"):
        judged.check(tmp_path / "out.json")
