"""What is refused before the library makes a sampler, and the switch of the engine's tuning."""

from __future__ import annotations

from typing import Any, cast

import pytest

from runtime.commands.options import model_options
from runtime.engine.model import Model
from runtime.engine.sampling import SamplingOptions, build_chain
from toolchain.base.errors import UsageError


class Vocabulary:
    """A model of ten tokens whose library nobody may call."""

    n_vocab = 10

    @property
    def lib(self) -> Any:
        raise AssertionError("a sampler was begun that nobody frees")


@pytest.mark.parametrize("token", [10, -1])
def test_bias_of_an_unknown_token_is_refused_before_anything_is_made(token: int) -> None:
    with pytest.raises(UsageError, match=f"names token {token}") as caught:
        build_chain(cast(Model, Vocabulary()), SamplingOptions(logit_bias={0: 1.0, token: 2.0}), [])
    assert "0 to 9" in caught.value.hint


@pytest.mark.parametrize(("value", "off"), [("", False), ("0", False), ("False", False), ("no", False), ("1", True)])
def test_tuning_is_turned_off_by_a_variable_that_says_so(
    monkeypatch: pytest.MonkeyPatch, value: str, off: bool
) -> None:
    monkeypatch.setenv("FOUNDRY_NO_TUNE", value)
    assert model_options().parse_args(["m.gguf"]).no_tune is off
