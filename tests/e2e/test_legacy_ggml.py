"""GGML files of 2023 through the front door: converted on first use by the pinned converter, then only read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.front_door import json_without_processes, leftovers, runtime
from tests.legacy_ggml_files import write_legacy
from toolchain.base import files
from toolchain.base.files import PROJECT_ROOT
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain

PATIENCE_S = 120


@pytest.fixture
def environment(toolchain: Toolchain, tmp_path: Path) -> dict[str, str]:
    """A FOUNDRY_HOME that borrows Toolchains and sources of the real one."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("toolchains", "sources"):
        (home / name).symlink_to(files.home_dir(name))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    return {**clean, "FOUNDRY_HOME": str(home), "FOUNDRY_NO_TUNE": "1", "TERM": "dumb", "GOMP_SPINCOUNT": "100"}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def run(environment: dict[str, str], *arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    return runtime(environment, *arguments, given=given, cwd=PROJECT_ROOT)


def complete(environment: dict[str, str], model: Path) -> tuple[str, str]:
    """The reply's text, and the story on stderr."""
    done = run(environment, "complete", model, "-p", "Hello", "-n", 12, "--temp", 0, "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["text"]), done.stderr


def test_bin_of_2023_is_converted_once_and_writes_text(environment: dict[str, str], models: Path) -> None:
    original = write_legacy(models / "llama-2-7b.ggmlv3.q4_0.bin")
    before = original.read_bytes(), original.stat().st_mtime_ns
    text, story = complete(environment, original)
    assert text
    assert "convert llama-2-7b.ggmlv3.q4_0.bin to GGUF (GGJT v3, Q4_0; once)" in story
    made = models / "llama-2-7b.ggmlv3.q4_0.bin.gguf"
    again, story = complete(environment, original)
    assert (again, "convert" in story) == (text, False)
    assert complete(environment, made)[0] == text
    assert (original.read_bytes(), original.stat().st_mtime_ns) == before
    assert leftovers(models) == []


def test_gguf_holds_the_tensors_vocabulary_and_extents_of_the_original(
    environment: dict[str, str], models: Path
) -> None:
    original = write_legacy(models / "small.bin", type="F32", n_head=8, n_head_kv=2, n_ff=160)
    _, story = complete(environment, original)
    assert "does not say whether it is LLaMA 1 or 2" not in story  # grouped heads: Llama 2
    made = read_header(models / "small.bin.gguf")
    assert (made.architecture, made.n_layer, made.n_vocab, made.n_ctx_train) == ("llama", 2, 512, 4096)
    told = ("attention.head_count", "attention.head_count_kv", "embedding_length", "feed_forward_length")
    assert [made.arch_int(name) for name in told] == [8, 2, 64, 160]
    assert made.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens: Any = made.metadata["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in (0, 1, 2, 3, 258, 259)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>", "▁w0"]
    reader = gguf.GGUFReader(models / "small.bin.gguf")
    whole = original.read_bytes()
    for name, shape in (("blk.1.ffn_down.weight", (160, 64)), ("blk.0.attn_k.weight", (64, 16))):
        tensor = next(each for each in reader.tensors if each.name == name)
        assert tuple(map(int, tensor.shape)) == shape
        assert np.asarray(tensor.data).tobytes() in whole


def test_second_use_starts_no_process_and_a_changed_original_is_converted_anew(
    environment: dict[str, str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_legacy(models / "small.bin")
    first, _ = complete(environment, original)
    monkeypatch.setenv("FOUNDRY_HOME", environment["FOUNDRY_HOME"])
    asked = (
        f'from runtime.legacy_ggml import converted\nprint(\'{{"path": "%s"}}\' % converted(Path({str(original)!r})))'
    )
    assert json_without_processes(asked) == {"path": str(models / "small.bin.gguf")}
    write_legacy(original, seed=1)
    other, story = complete(environment, original)
    assert "convert small.bin" in story
    assert other != first


def test_of_two_first_uses_at_once_one_converts(environment: dict[str, str], models: Path) -> None:
    original = write_legacy(models / "small.bin", n_layer=40)
    argv = [sys.executable, "-m", "runtime", "complete", str(original), "-p", "x", "-n", "1", "--temp", "0"]
    both = [
        subprocess.Popen(
            argv, cwd=PROJECT_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [child.communicate(timeout=PATIENCE_S) for child in both]
    assert [child.returncode for child in both] == [0, 0], told
    assert sum("✓ convert small.bin" in story for _, story in told) == 1
    assert told[0][0] == told[1][0]
    assert leftovers(models) == []


def test_where_the_folder_may_not_be_written_the_gguf_lies_in_foundry_home(
    environment: dict[str, str], models: Path
) -> None:
    """So it does where a file of that name is not ours."""
    original = write_legacy(models / "small.bin")
    (models / "small.bin.gguf").write_bytes(b"somebody else's")
    complete(environment, original)
    assert (models / "small.bin.gguf").read_bytes() == b"somebody else's"
    made = list(Path(environment["FOUNDRY_HOME"]).glob("work/legacy/*/small.bin.gguf"))
    assert len(made) == 1
    assert read_header(made[0]).n_layer == 2
    assert "convert" not in complete(environment, original)[1]


def test_blocks_of_an_older_layout_end_with_a_usage_error(environment: dict[str, str], models: Path) -> None:
    done = run(environment, "chat", write_legacy(models / "old.bin", version=2, type="Q4_0"))
    assert done.returncode == 2, done.stderr
    assert "old.bin is a GGJT v2 file of type Q4_0" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in models.iterdir()] == ["old.bin"]


def test_a_cut_file_is_refused_before_the_converter_starts(environment: dict[str, str], models: Path) -> None:
    path = write_legacy(models / "cut.bin")
    path.write_bytes(path.read_bytes()[:-100])
    done = run(environment, "complete", path, "-p", "x")
    assert done.returncode == 6, done.stderr
    assert "the file ends inside" in done.stderr
    assert "convert cut.bin" not in done.stderr
    assert [each.name for each in models.iterdir()] == ["cut.bin"]


def test_a_70b_is_converted_with_its_grouped_heads(environment: dict[str, str], models: Path) -> None:
    """As many layers and as few heads of keys as Llama 2 70B has, at a width of 64."""
    original = write_legacy(models / "big.bin", n_layer=80, n_head=8, n_head_kv=1, n_embd=64, n_vocab=260)
    program = (
        "from pathlib import Path\nfrom runtime.legacy_ggml import converted, require_70b\n"
        "from toolchain.base.gguf import read_header\n"
        f"require_70b(read_header(converted(Path({str(original)!r}), is_70b=True)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    note = json.loads((models / "big.bin.gguf.from.json").read_text())
    assert note["arguments"] == ["--gqa", "8", "--eps", "1e-5", "--context-length", "4096"]
