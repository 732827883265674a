"""Which scales a request to the server is answered with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.serve.adapters import Adapters
from runtime.serve.private import public
from runtime.serve.replies import Refusal

CHAT = "/v1/chat/completions"


def sent(adapters: Adapters, label: str = CHAT, *, restarts: int = 0, **body: Any) -> Any:
    return json.loads(adapters.settled(label, json.dumps(body).encode(), restarts=restarts))


def scales(body: Any) -> list[float]:
    assert [each["id"] for each in body["lora"]] == list(range(len(body["lora"])))
    return [each["scale"] for each in body["lora"]]


def test_a_request_names_everybodys_scales_unless_it_has_its_own() -> None:
    adapters = Adapters((1.0, 0.0))
    assert scales(sent(adapters)) == scales(sent(adapters, lora=[])) == [1.0, 0.0]
    assert scales(sent(adapters, lora=[{"id": 1, "scale": 2}])) == [0.0, 2.0]
    adapters.set(adapters.asked(b'[{"id": 1, "scale": -0.5}]'), restarts=0)
    assert scales(sent(adapters)) == [0.0, -0.5]


def test_a_llama_server_that_was_started_again_has_the_scales_of_the_start() -> None:
    adapters = Adapters((0.25,))
    adapters.set((1.0,), restarts=0)
    assert scales(sent(adapters, restarts=0)) == [1.0]
    assert scales(sent(adapters, restarts=1)) == [0.25]


def test_the_prompt_cache_is_used_where_scales_are_named_unless_the_client_says_no() -> None:
    adapters = Adapters((1.0,))
    assert sent(adapters)["cache_prompt"] is True
    assert sent(adapters, cache_prompt=False)["cache_prompt"] is False


def test_all_else_of_a_request_stays_as_it_is() -> None:
    messages = [{"role": "user", "content": 'é " \ud83d \U0001f600'}]
    body: dict[str, Any] = {"messages": messages, "temperature": 0.1, "seed": 2**63}
    found = sent(Adapters((1.0,)), **body)
    assert {name: found[name] for name in body} == body


@pytest.mark.parametrize("body", [b'{"prompt": "lora", "n": 1}', b'{"lora":[]}', b'{"lor\\u0061": []}'])
def test_without_adapters_a_body_passes_byte_for_byte(body: bytes) -> None:
    assert Adapters(()).settled(CHAT, body, restarts=0) == body


NO_OBJECTS = [b"", b"{", b"[1]", b'"x"', b"--boundary\r\n", b"[" * 100_000, b'{"prompt": "x", "cache_prompt": true}\0']


@pytest.mark.parametrize("body", NO_OBJECTS)
def test_a_body_that_scales_cannot_be_named_in_is_refused(body: bytes) -> None:
    """llama-server reads some of these, and would go on from what another scale computed."""
    with pytest.raises(Refusal) as refused:
        Adapters((1.0,)).settled(CHAT, body, restarts=0)
    assert refused.value.response.status == 400


@pytest.mark.parametrize("body", NO_OBJECTS)
def test_where_no_scales_are_named_such_a_body_is_left_to_llama_server(body: bytes) -> None:
    assert Adapters(()).settled(CHAT, body, restarts=0) == body
    assert Adapters((1.0,)).settled("/v1/audio/transcriptions", body, restarts=0) == body


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ([{"id": 2, "scale": 1}], "no adapter 2; ids: 0, 1"),
        ([{"id": -1, "scale": 1}], "no adapter -1"),
        ([{"id": "0", "scale": 1}], 'no adapter "0"'),
        ([{"id": True, "scale": 1}], "no adapter true"),
        ([{"scale": 1}], "no adapter null"),
        ([{"id": 0}], "not a number"),
        ([{"id": 0, "scale": "1"}], "not a number"),
        ([{"id": 0, "scale": True}], "not a number"),
        ([{"id": 0, "scale": float("nan")}], "not a number"),
        ([{"id": 0, "scale": 1e39}], "not a number"),
        ([{"id": 0, "scale": 10**400}], "not a number"),
        (["x"], "is a list such as"),
        ({"id": 0, "scale": 1}, "is a list such as"),
        (None, "is a list such as"),
        (0, "is a list such as"),
    ],
)
def test_scales_that_cannot_be_had_are_refused(asked: Any, why: str) -> None:
    adapters = Adapters((1.0, 0.0))
    with pytest.raises(Refusal) as refused:
        sent(adapters, lora=asked)
    assert refused.value.response.status == 400
    assert why in json.loads(refused.value.response.text or "")["error"]["message"]
    with pytest.raises(Refusal):
        adapters.asked(json.dumps(asked).encode())


@pytest.mark.parametrize("label", [CHAT, "/v1/embeddings", "/v1/messages"])
@pytest.mark.parametrize("spelled", [b'{"lora": [{"id": 0, "scale": 1}]}', b'{"\\u006cora": [{"id": 0, "scale": 1}]}'])
def test_scales_for_a_model_without_adapters_are_refused(label: str, spelled: bytes) -> None:
    with pytest.raises(Refusal):
        Adapters(()).settled(label, spelled, restarts=0)


def test_endpoints_that_take_no_scales_say_so_and_pass_without_them() -> None:
    adapters, body = Adapters((1.0,)), b'{"input":"x"}'
    assert adapters.settled("/v1/embeddings", body, restarts=0) == body
    for label in ("/v1/embeddings", "/v1/messages"):
        with pytest.raises(Refusal) as refused:
            sent(adapters, label, lora=[{"id": 0, "scale": 1}])
        assert f"{label} takes no lora" in (refused.value.response.text or "")


def test_clients_learn_the_names_of_adapters_and_not_their_paths() -> None:
    told = json.loads(public(b'[{"id":0,"path":"/home/me/poet.gguf","scale":1.0}]'))
    assert told == [{"id": 0, "path": "poet.gguf", "scale": 1.0}]
