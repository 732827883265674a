"""What the constructor of LLaMa is given: which model that means, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.llama.asked import Asked, as_loras, as_settings, requested
from tests.generated_models import write_header
from toolchain.base import files
from toolchain.base.errors import UsageError


def asked(model: Path | str, **changes: Any) -> Asked:
    given: dict[str, Any] = {
        "n_ctx": 2048,
        "settings": {},
        "quantize_format": "auto",
        "is_70b": False,
        "lora": (),
        "force_adapters": False,
        "tune": False,
        "verbose": 0,
        **changes,
    }
    return Asked(model_path=model, **given)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_header(tmp_path / "small.gguf", "llama", n_ctx_train=1024)


def test_default_context_is_no_longer_than_the_model_has(model: Path, tmp_path: Path) -> None:
    assert requested(asked(model))[0].flags == {"n_ctx": 1024}
    longer = write_header(tmp_path / "longer.gguf", "llama", n_ctx_train=8192)
    assert requested(asked(longer))[0].flags == {"n_ctx": 2048}


def test_asked_context_is_never_changed(model: Path) -> None:
    assert requested(asked(model, n_ctx=4096))[0].flags == {"n_ctx": 4096}


def test_minus_one_asks_for_nothing(model: Path) -> None:
    settings = {"n_threads": -1, "n_gpu_layers": -1, "type_k": None, "n_batch": 64}
    assert requested(asked(model, n_ctx=-1, settings=settings))[0].flags == {"n_batch": 64}


def test_context_of_the_environment_stands_against_the_default(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_N_CTX", "512")
    assert requested(asked(model))[0].flags == {}
    assert requested(asked(model, n_ctx=256))[0].flags == {"n_ctx": 256}


def test_environment_turns_tuning_off(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_NO_TUNE", "0")
    assert requested(asked(model, tune=True))[0].tune
    monkeypatch.setenv("FOUNDRY_NO_TUNE", "1")
    assert not requested(asked(model, tune=True))[0].tune


def test_claim_of_70b_is_held_against_the_header(model: Path) -> None:
    with pytest.raises(UsageError, match=r"llama, 4 layers .* parameters"):
        requested(asked(model, is_70b=True))


def test_true_claim_of_70b_is_taken(tmp_path: Path) -> None:
    large = write_header(tmp_path / "large.gguf", "llama", n_layer=80, n_head=8, n_head_kv=1, n_ctx_train=4096)
    assert requested(asked(large, is_70b=True))[1].header.n_layer == 80


def test_file_of_another_quantization_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="not Q4_K_M") as caught:
        requested(asked(model, quantize_format="Q4_K_M"))
    assert "bits per weight" in caught.value.evidence


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's results of two types."""
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    folder = tmp_path / "models" / "twins"
    folder.mkdir(parents=True)
    artifacts = []
    for kind in ("Q8_0", "Q4_K_M"):
        path = write_header(folder / f"twins-{kind}.gguf", "llama", n_ctx_train=1024)
        artifacts.append({"type": kind, "file": path.name, "bytes": path.stat().st_size})
    files.write_json(folder / "manifest.json", {"artifacts": artifacts, "runtime": {"n_ctx": 777}})
    return folder


@pytest.mark.usefixtures("results")
def test_quantization_chooses_among_a_recipes_results() -> None:
    assert requested(asked("twins"))[1].header.path.name == "twins-Q8_0.gguf"
    assert requested(asked("twins", quantize_format="q4_k_m"))[1].header.path.name == "twins-Q4_K_M.gguf"
    assert requested(asked("twins:Q4_K_M", quantize_format="Q4_K_M"))[0].model == "twins:Q4_K_M"
    with pytest.raises(UsageError, match="names Q8_0, quantize_format Q4_K_M"):
        requested(asked("twins:Q8_0", quantize_format="Q4_K_M"))


@pytest.mark.usefixtures("results")
def test_quantization_that_a_recipe_does_not_have_is_told_with_those_it_has() -> None:
    with pytest.raises(UsageError) as caught:
        requested(asked("twins", quantize_format="Q2_K"))
    assert "Q8_0, Q4_K_M" in caught.value.evidence


@pytest.mark.usefixtures("results")
def test_context_of_a_recipe_stands_against_the_default() -> None:
    assert requested(asked("twins"))[0].flags == {}


def test_adapters_are_given_in_any_form() -> None:
    assert as_loras("a.gguf") == ("a.gguf",)
    assert as_loras(()) == as_loras(None) == ()
    assert as_loras(("a.gguf", 0.5)) == (("a.gguf", 0.5),)
    assert as_loras(["a.gguf", Path("b.gguf"), ("c.gguf", 2)]) == ("a.gguf", Path("b.gguf"), ("c.gguf", 2))
    assert as_settings({"tensor_split": (3, 1), "n_batch": 64, "type_k": None}) == {
        "tensor_split": "3,1",
        "n_batch": 64,
        "type_k": None,
    }
