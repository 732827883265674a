"""PEFT folders that cannot become GGUF adapters are refused before anything is started, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.generated_models import write_model
from toolchain.base.errors import ArtifactError, FoundryError, UsageError
from toolchain.build.toolchain import Toolchain
from toolchain.lora.forms.peft_form import CONFIG, WEIGHTS, from_peft, to_peft

NO_TOOLCHAIN: Any = None


def folder(path: Path, *, weights: str = WEIGHTS, **changes: object) -> Path:
    path.mkdir()
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", **changes}))
    (path / weights).write_bytes(b"")
    return path


def refusal(path: Path, tmp_path: Path) -> FoundryError:
    toolchain: Toolchain = NO_TOOLCHAIN
    with pytest.raises((UsageError, ArtifactError)) as raised:
        from_peft(path, tmp_path / "no-base.gguf", tmp_path / "out.gguf", toolchain=toolchain, log=tmp_path / "log")
    assert not (tmp_path / "out.gguf").exists()
    return raised.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True, "layer_replication": [[0, 2]]}, "replicated layers, biases"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "stacked experts"),
        ({"trainable_token_indices": [5]}, "single token embeddings"),
    ],
)
def test_what_is_more_than_pairs_of_matrices_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    error = refusal(folder(tmp_path / "peft", **changes), tmp_path)
    assert words in error.message
    assert "merge_and_unload" in error.hint


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_adapter_whose_base_was_changed_with_it_is_refused(tmp_path: Path, begun: str) -> None:
    error = refusal(folder(tmp_path / "peft", init_lora_weights=begun), tmp_path)
    assert "belongs to a changed base" in error.message
    assert "path_initial_model_for_weight_conversion" in error.hint


@pytest.mark.parametrize("begun", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_beginnings_leave_the_base_alone(tmp_path: Path, begun: bool | str) -> None:
    """The next thing that is missed is the base."""
    assert "no-base.gguf" in refusal(folder(tmp_path / "peft", init_lora_weights=begun), tmp_path).message


def test_another_kind_of_adapter_is_named(tmp_path: Path) -> None:
    assert "'IA3'" in refusal(folder(tmp_path / "peft", peft_type="IA3"), tmp_path).message


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    error = refusal(folder(tmp_path / "peft", weights="adapter_model.bin"), tmp_path)
    assert "can run code when it is read" in error.message
    assert "weights_only=True" in error.hint
    assert str(tmp_path / "peft" / WEIGHTS) in error.hint


def test_missing_parts_are_named_with_what_is_there(tmp_path: Path) -> None:
    assert "it holds: nothing" in refusal(tmp_path / "nowhere", tmp_path).evidence
    only_config = folder(tmp_path / "peft")
    (only_config / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in refusal(only_config, tmp_path).message
    (only_config / CONFIG).rename(only_config / "config.json")
    assert "it holds: config.json" in refusal(only_config, tmp_path).evidence


def test_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    broken = folder(tmp_path / "peft")
    (broken / CONFIG).write_text("{")
    assert "cannot be read" in refusal(broken, tmp_path).message
    (broken / CONFIG).write_text("[]")
    assert "of the kind None" in refusal(broken, tmp_path).message


def test_what_is_no_adapter_does_not_become_a_peft_folder(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", "llama", n_layer=1)
    with pytest.raises(UsageError, match="not a LoRA adapter"):
        to_peft(base, base, tmp_path / "out", log=tmp_path / "log")
    assert not (tmp_path / "out").exists()
