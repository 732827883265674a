"""The demo model's arithmetic and its manners as a child; training itself belongs to the e2e tier."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolchain.stages.corpus import corpus_digest
from toolchain.stages.demo_model import (
    CHAT_TEMPLATE,
    PRESETS,
    DemoPreset,
    demo_bytes,
    learning_rate_share,
    main,
    model_card,
    n_params,
)

ROOT = Path(__file__).resolve().parents[2]


def test_importing_is_light() -> None:
    script = (
        "import sys, toolchain.stages.demo_model\n"
        "print(*sorted({'torch', 'transformers', 'sentencepiece', 'numpy'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == ""


def test_an_unknown_preset_is_a_usage_error_that_names_the_presets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--out", str(tmp_path / "out"), "--preset", "huge"])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in PRESETS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--steps", "--threads"])
def test_none_of_what_must_be_some_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main(["--out", str(tmp_path / "out"), flag, "0"]) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_reported_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["--out", str(tmp_path)]) == 3
    assert "1,000 bytes are free" in capsys.readouterr().err


def test_a_directory_with_files_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_impossible_directory_is_reported_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "out")]) == 3
    assert "cannot write" in capsys.readouterr().err


def test_n_params_adds_up_tensor_by_tensor() -> None:
    # Counted on the tensors of a trained model: 2 x 4096x256, 4 layers, one final norm.
    assert n_params(PRESETS["tiny"]) == 5_245_184
    attention = 256 * 256 + 2 * 128 * 256 + 256 * 256
    assert n_params(PRESETS["tiny"]) == 2 * 4096 * 256 + 4 * (attention + 3 * 256 * 768 + 2 * 256) + 256
    assert n_params(PRESETS["tiny-mha"]) - n_params(PRESETS["tiny"]) == 4 * 2 * 128 * 256


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_every_row_is_whole_k_quant_blocks_and_heads_divide_evenly(preset: DemoPreset) -> None:
    assert preset.hidden_size % 256 == preset.intermediate % 256 == 0
    assert preset.hidden_size % preset.heads == preset.heads % preset.kv_heads == 0
    assert preset.seq_len <= preset.context


def test_tiny_is_grouped_query_and_tiny_mha_is_not() -> None:
    assert PRESETS["tiny"].kv_heads < PRESETS["tiny"].heads
    assert PRESETS["tiny-mha"].kv_heads == PRESETS["tiny-mha"].heads


def test_demo_bytes_is_little_more_than_the_float32_weights() -> None:
    weight_bytes = 4 * n_params(PRESETS["tiny"])
    assert weight_bytes < demo_bytes(PRESETS["tiny"]) < 1.01 * weight_bytes


@pytest.mark.parametrize("steps", [1, 2, 40, 400])
def test_the_learning_rate_rises_then_falls_and_is_never_zero(steps: int) -> None:
    shares = [learning_rate_share(step, steps, 40) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    peak = shares.index(max(shares))
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


def test_the_chat_template_ends_every_turn_with_eos() -> None:
    jinja2_sandbox = pytest.importorskip("jinja2.sandbox")
    template = jinja2_sandbox.ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "What is a class?"}, {"role": "assistant", "content": "A type."}]
    rendered = template.render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert rendered == "<s><|user|>\nWhat is a class?</s>\n<|assistant|>\nA type.</s>\n"
    prompt = template.render(messages=messages[:1], bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert prompt == "<s><|user|>\nWhat is a class?</s>\n<|assistant|>\n"


def test_the_model_card_says_what_it_was_made_from() -> None:
    card = model_card(PRESETS["tiny"], seed=7, steps=3, threads=2)
    for fact in ("pydoc_data.topics", "--seed 7 --steps 3", corpus_digest("train")):
        assert fact in card
