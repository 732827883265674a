from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.settings import ALL_LAYERS, NAMES, Setting, Settings, Value, asked, parse_split, sequences_made, settle
from tests.described import machine
from toolchain.base.errors import UsageError
from toolchain.base.gpu import Gpu

HERE = machine(ram_bytes=2**34, available_bytes=2**33)


def settled(n_ctx_train: int | None = 2048, **layers: object) -> Settings:
    return settle(machine=HERE, n_ctx_train=n_ctx_train, **layers)  # type: ignore[arg-type]


def test_every_setting_has_a_value_and_an_origin() -> None:
    settings = settled()
    assert tuple(entry.name for entry in settings.entries) == NAMES
    assert {entry.origin for entry in settings.entries} == {"default"}
    assert [sorted(entry) for entry in settings.as_json()] == [["name", "origin", "reason", "value"]] * len(NAMES)


def test_stronger_layers_win_one_by_one() -> None:
    layers: dict[str, object] = {}
    steps: list[tuple[str, object, int, str]] = [
        ("tuned", (Setting(name="n_threads", value=2, origin="tuned"),), 2, "tuned"),
        ("recipe", {"n_threads": 3}, 3, "recipe"),
        ("env", {"FOUNDRY_N_THREADS": "5"}, 5, "env"),
        ("flags", {"n_threads": "6"}, 6, "flag"),
    ]
    for layer, content, value, origin in steps:
        layers[layer] = content
        chosen = settled(**layers)["n_threads"]
        assert (chosen.value, chosen.origin) == (value, origin)


def test_context_is_what_the_model_has_up_to_the_default() -> None:
    assert settled(n_ctx_train=256).number("n_ctx") == 256
    assert settled(n_ctx_train=131072).number("n_ctx") == 4096
    assert settled(n_ctx_train=None).number("n_ctx") == 4096


def test_more_context_than_trained_is_refused_and_says_what_there_is() -> None:
    with pytest.raises(UsageError, match="trained with 2048") as caught:
        settled(env={"FOUNDRY_N_CTX": "4096"})
    assert "FOUNDRY_N_CTX" in caught.value.evidence


def test_recipe_kv_type_names_both_caches_and_yields_to_a_flag() -> None:
    settings = settled(recipe={"kv_type": "q8_0"}, flags={"type_v": "F16"})
    assert (settings.text("type_k"), settings.text("type_v")) == ("q8_0", "f16")


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_ctx", "many"), ("n_ctx", "0"), ("n_ctx", "4.5"), ("n_threads", "0"), ("n_threads", "100000"), ("n_batch", -1)],
)
def test_bad_numbers_are_refused(name: str, value: Value) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
        settled(flags={name: value})


def test_bad_cache_type_suggests_the_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        settled(flags={"type_k": "q8-0"})
    assert "did you mean q8_0?" in caught.value.hint


def test_shares_of_gpus_are_numbers_with_commas() -> None:
    assert settled(env={"FOUNDRY_TENSOR_SPLIT": "3/1"}).text("tensor_split") == "3,1"
    assert parse_split("3,1") == (3.0, 1.0)
    for wrong in ("three", "0,0", "1,,2", "-1,2", "nan"):
        with pytest.raises(UsageError, match="no shares"):
            settled(flags={"tensor_split": wrong})


def test_what_was_asked_for_is_told_apart_from_what_was_chosen() -> None:
    given = asked(recipe={"n_ctx": 64, "kv_type": "q8_0"}, env={"FOUNDRY_N_CTX": "128"}, flags={"n_ubatch": None})
    assert {name: (each.value, each.origin) for name, each in given.items()} == {
        "n_ctx": (128, "env"),
        "type_k": ("q8_0", "recipe"),
        "type_v": ("q8_0", "recipe"),
    }


def test_unknown_recipe_setting_suggests_the_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        settled(recipe={"n_ctxt": 64})
    assert "did you mean n_ctx?" in caught.value.hint


def test_all_layers_may_be_spelled() -> None:
    assert settled(flags={"n_gpu_layers": "all"}).number("n_gpu_layers") == ALL_LAYERS


def test_gpu_gets_all_layers_by_default() -> None:
    with_gpu = replace(HERE, gpus=(Gpu(name="NVIDIA H200"),))
    chosen = settle(machine=with_gpu, n_ctx_train=None)["n_gpu_layers"]
    assert (chosen.value, chosen.reason) == (ALL_LAYERS, "all layers on NVIDIA H200")


def test_default_batch_follows_the_one_asked_for() -> None:
    assert settled(flags={"n_batch": "64"}).number("n_ubatch") == 64
    assert settled(flags={"n_ubatch": "4096"}).number("n_batch") == 4096
    with pytest.raises(UsageError, match="n_ubatch 64 is more than n_batch 32"):
        settled(flags={"n_batch": "32", "n_ubatch": "64"})


def test_several_replies_take_one_more_sequence_for_what_they_begin_with() -> None:
    assert [sequences_made(asked_for) for asked_for in (0, 1, 2, 16, 17, 400)] == [1, 1, 3, 17, 17, 17]
