"""Adapters to PEFT's form and back: nothing is lost, and peft computes with them what the merged model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.test_lora_merge import small_adapter
from tests.generated_models import Family, write_model
from tests.lora_runs import ALL_LINEAR
from tests.unit.test_lora_adapter import adapter_for, same
from toolchain.base import files
from toolchain.base.errors import ArtifactError, CommandError, FoundryError, UsageError
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.lora.child_errors import raise_failure
from toolchain.lora.forms.adapter import AdapterModel, Pair, read_adapter, write_adapter
from toolchain.lora.forms.merge import merge
from toolchain.lora.forms.peft_form import CONFIG, WEIGHTS, from_peft, to_peft
from toolchain.lora.forms.requantize import parse_type
from toolchain.lora.spec import TrainSpec

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the child does is done here: it needs seconds for its imports, each time. Two tests start it."""
    from toolchain.lora.forms import peft_child, peft_form

    def child(room: Path, request: dict[str, Any], log: Path) -> None:
        files.write_json(room / "request.json", request)
        if peft_child.main(room / "request.json"):
            raise_failure(room, CommandError("the child failed"))

    monkeypatch.setattr(peft_form, "_child", child)


def model_of(family: str, path: Path) -> Path:
    """A small model whose heads share keys and values, with an output matrix of its own where the family allows."""
    return write_model(path, family, random=True, n_layer=2, n_vocab=300, n_ctx_train=512)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_to_peft_and_back_keeps_every_bit(
    toolchain: Toolchain, family: Family, tmp_path: Path, log: Path, request: pytest.FixtureRequest
) -> None:
    """There by transformers' names and row orders, back by llama.cpp's converter."""
    if family != "llama":
        request.getfixturevalue("at_once")
    base = model_of(family, tmp_path / "base.gguf")
    embedding = ("token_embd",) if family in ("llama", "phi3") else ()
    adapter = small_adapter(base, tmp_path / "a.gguf", "attn_", "ffn_", *embedding)
    to_peft(adapter, base, tmp_path / "peft", log=log)
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [CONFIG, WEIGHTS]
    told = from_peft(tmp_path / "peft", base, tmp_path / "back.gguf", toolchain=toolchain, log=log)
    before, after = read_adapter(adapter), read_adapter(tmp_path / "back.gguf")
    assert same(before, after)
    assert after.alpha == before.alpha == told.alpha
    assert (after.base_name, after.base_sha256) == ("base.gguf", tensors_sha256(read_header(base)))
    assert after.notes == {"source": "peft:peft"}


def logits(base: Path, lib_dir: Path, peft: Path | None = None) -> Any:
    """Of 24 tokens, by transformers on the unpacked weights, with peft's adapter where there is one."""
    import torch
    from peft import PeftModel

    from toolchain.lora.torch_engine.load import load_base

    model: Any = load_base([base], lib_dir=lib_dir, packed=False).model
    if peft:
        model = PeftModel.from_pretrained(model, str(peft))
    with torch.no_grad():
        return model(torch.arange(5, 29)[None]).logits[0].numpy()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("family", "form"), [("qwen3", "plain"), ("llama", "ranks"), ("llama", "alpha 0"), ("llama", "dora")]
)
def test_peft_computes_what_the_merged_model_computes(
    toolchain: Toolchain, family: Family, form: str, tmp_path: Path, log: Path
) -> None:
    base = model_of(family, tmp_path / "base.gguf")
    adapter = read_adapter(small_adapter(base, tmp_path / "a.gguf", size=0.1))
    numbers = np.random.default_rng(1)

    def changed(name: str, pair: Pair) -> Pair:
        if form in ("ranks", "alpha 0") and "attn_k" in name:
            return Pair(a=pair.a[:2].copy(), b=pair.b[:, :2].copy())
        if form == "dora":
            return replace(pair, magnitude=numbers.uniform(0.5, 1.5, len(pair.b)).astype(np.float32))
        return pair

    pairs = {name: changed(name, pair) for name, pair in adapter.pairs.items()}
    alpha = 0.0 if form == "alpha 0" else adapter.alpha
    write_adapter(tmp_path / "b.gguf", replace(adapter, pairs=pairs, alpha=alpha))
    to_peft(tmp_path / "b.gguf", base, tmp_path / "peft", log=log)
    chosen, merged = [(tmp_path / "b.gguf", 1.0)], tmp_path / "m.gguf"
    merge(base, chosen, merged, toolchain=toolchain, log=log, asked=parse_type("F32"))
    with_adapter = logits(base, toolchain.lib_dir, tmp_path / "peft")
    np.testing.assert_allclose(with_adapter, logits(merged, toolchain.lib_dir), atol=1e-4)
    assert np.abs(with_adapter - logits(base, toolchain.lib_dir)).max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trains_is_one_adapter_in_either_form(
    toolchain: Toolchain, rslora: bool, demo_gguf: Path, tmp_path: Path, log: Path
) -> None:
    """The training's own GGUF, and its PEFT folder over llama.cpp's converter: the same to the last bit."""
    import torch

    from toolchain.lora.torch_engine.adapt import adapt, adapter_model
    from toolchain.lora.torch_engine.load import load_base

    unused: dict[str, Any] = dict.fromkeys(TrainSpec.__dataclass_fields__, 0)
    asked = {"base": [str(demo_gguf)], "targets": ALL_LINEAR, "rank": 4, "alpha": 8.0, "dropout": 0.0, "seed": 1}
    spec = TrainSpec.from_json({**unused, **asked, "rslora": rslora})
    adapted = adapt(load_base([demo_gguf], lib_dir=toolchain.lib_dir).model, spec)
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    own = adapter_model(adapted, architecture="llama", base_sha256="", base_name="")
    write_adapter(tmp_path / "own.gguf", own)
    adapted.peft.save_pretrained(str(tmp_path / "peft"))
    from_peft(tmp_path / "peft", demo_gguf, tmp_path / "converted.gguf", toolchain=toolchain, log=log)
    converted = read_adapter(tmp_path / "converted.gguf")
    assert same(read_adapter(tmp_path / "own.gguf"), converted)
    assert converted.alpha == pytest.approx(own.alpha, rel=1e-7)


@pytest.fixture
def peft(demo_gguf: Path, tmp_path: Path, log: Path, at_once: None) -> Path:
    """A sound PEFT folder for the demo model."""
    adapter = small_adapter(demo_gguf, tmp_path / "a.gguf", "attn_q", "ffn_up")
    to_peft(adapter, demo_gguf, tmp_path / "peft", log=log)
    return tmp_path / "peft"


def edit(folder: Path, change: Callable[[dict[str, Any]], None], **config: object) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    told = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**told, **config}))


def test_a_scale_of_its_own_is_brought_into_the_matrix(
    toolchain: Toolchain, demo_gguf: Path, peft: Path, tmp_path: Path, log: Path
) -> None:
    """llama.cpp knows one alpha for all, its converter none but lora_alpha."""
    edit(peft, lambda tensors: None, alpha_pattern={r".*layers\.1\..*q_proj": 64})
    from_peft(peft, demo_gguf, tmp_path / "back.gguf", toolchain=toolchain, log=log)
    before, after = read_adapter(tmp_path / "a.gguf"), read_adapter(tmp_path / "back.gguf")
    assert after.alpha == before.alpha == 16
    for target, pair in after.pairs.items():
        times = 4 if target == "blk.1.attn_q.weight" else 1
        np.testing.assert_array_equal(pair.b, times * before.pairs[target].b)


def test_a_folder_that_does_not_fit_is_refused_by_the_module(
    toolchain: Toolchain, demo_gguf: Path, peft: Path, tmp_path: Path, log: Path
) -> None:
    def refusal(change: Callable[[dict[str, Any]], None], base: Path = demo_gguf) -> FoundryError:
        kept = (peft / WEIGHTS).read_bytes()
        edit(peft, change)
        with pytest.raises((ArtifactError, UsageError)) as raised:
            from_peft(peft, base, tmp_path / "back.gguf", toolchain=toolchain, log=log)
        (peft / WEIGHTS).write_bytes(kept)
        assert not (tmp_path / "back.gguf").exists()
        return raised.value

    def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: tensors.update(
            {name.replace(old, new): tensors.pop(name) for name in list(tensors) if old in name}
        )

    assert (
        "changes model.layers.9.self_attn.q_proj"
        in refusal(renamed("layers.3.self_attn", "layers.9.self_attn")).message
    )
    assert "one half is missing" in refusal(lambda tensors: tensors.pop(Q.format("A"))).message
    assert "no half of a pair" in refusal(lambda tensors: tensors.update({"lm_head.weight": np.ones((2, 2))})).message
    wide = refusal(lambda tensors: tensors.update({Q.format("A"): np.ones((4, 99), np.float32)}))
    assert "does not fit model.layers.0.self_attn.q_proj" in wide.message
    nan = refusal(lambda tensors: tensors.update({Q.format("A"): np.full((4, 256), np.nan, np.float32)}))
    assert "not finite" in nan.message
    other = model_of("qwen3", tmp_path / "other.gguf")
    assert "does not" in refusal(lambda tensors: None, other).message
    (peft / WEIGHTS).write_bytes((peft / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        from_peft(peft, demo_gguf, tmp_path / "back.gguf", toolchain=toolchain, log=log)


@pytest.mark.usefixtures("at_once")
def test_what_peft_s_form_has_no_place_for_is_refused(demo_gguf: Path, tmp_path: Path, log: Path) -> None:
    norms = AdapterModel(
        architecture="llama",
        alpha=1.0,
        pairs=adapter_for(demo_gguf, "attn_q").pairs,
        norms={"blk.0.attn_norm.weight": np.ones(256, np.float32)},
    )
    write_adapter(tmp_path / "n.gguf", norms)
    with pytest.raises(UsageError, match="changes 1 norms too"):
        to_peft(tmp_path / "n.gguf", demo_gguf, tmp_path / "peft", log=log)
    experts = model_of("mixtral", tmp_path / "experts.gguf")
    adapter = small_adapter(experts, tmp_path / "e.gguf", "exps")
    with pytest.raises(UsageError, match="no module of its own"):
        to_peft(adapter, experts, tmp_path / "peft", log=log)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no PEFT adapter"):
        to_peft(small_adapter(demo_gguf, tmp_path / "a.gguf"), demo_gguf, tmp_path / "peft", log=log)
    assert (tmp_path / "peft" / "diary.txt").read_text() == "mine"
