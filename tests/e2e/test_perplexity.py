"""llama-perplexity as the foundry starts it: what it said last is not lost, and its failures are told as its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.base.errors import ArtifactError, CommandError
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain
from toolchain.lora.judging.drift import drift
from toolchain.lora.judging.evaluate import perplexity
from toolchain.stages import perplexity_child
from toolchain.stages.evaluate import FINAL, ask, perplexity_argv


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("One line is like another, and the last. " * 60)
    return path


def test_the_last_line_is_there_however_slowly_it_is_read(toolchain: Toolchain, demo_gguf: Path, text: Path) -> None:
    """Of llama-perplexity itself nothing is left but what was read while it ran."""
    argv = perplexity_argv(toolchain.tool("perplexity"), demo_gguf, text, n_ctx=32, chunks=2)
    started, said = (sys.executable, perplexity_child.__file__, *argv, "--verbose"), b""
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pipesize=4096) as child:
        assert child.stdout is not None
        while piece := os.read(child.stdout.fileno(), 1024):
            said += piece
            time.sleep(0.01)
    assert child.returncode == 0
    assert FINAL.search(said.decode(errors="replace"))


def test_a_failure_bears_the_program_s_name(toolchain: Toolchain, text: Path, tmp_path: Path) -> None:
    argv = perplexity_argv(toolchain.tool("perplexity"), tmp_path / "none.gguf", text, n_ctx=32, chunks=2)
    with pytest.raises(CommandError, match="judging it: llama-perplexity ended with status 1") as caught:
        ask(argv, FINAL, label="it", log=tmp_path / "log", on_progress=lambda *_: None)
    assert "none.gguf" in caught.value.evidence


def test_a_model_whose_logits_are_no_numbers_does_not_compute(
    toolchain: Toolchain, demo_gguf: Path, text: Path, tmp_path: Path
) -> None:
    """To llama-perplexity it is a model that finds every token equally likely."""
    header, data = read_header(demo_gguf), bytearray(demo_gguf.read_bytes())
    norm = next(tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    start = header.data_offset + norm.offset
    data[start : start + norm.nbytes] = np.full(norm.n_elements, np.nan, np.float32).tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    asked: dict[str, Any] = {"n_ctx": 32, "toolchain": toolchain, "log": tmp_path / "log"}
    with pytest.raises(ArtifactError, match=r"broken\.gguf does not compute"):
        perplexity(broken, text, **asked)
    for reference, other in ((demo_gguf, broken), (broken, demo_gguf)):
        with pytest.raises(ArtifactError, match=r"broken\.gguf does not compute"):
            drift((reference, None), (other, None), text, **asked)
