"""Conversations with a server elsewhere: what is asked of it, what is made of its replies, and who gets the key."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.chat.backend import Backend, Figures, Piece, ReplyOptions
from runtime.chat.endpoint import connect, key_for
from runtime.chat.exchange import adapters, other_model
from runtime.chat.talk import Talk
from runtime.engine.sampling import SamplingOptions
from runtime.interrupts import Interrupt
from tests.failing_server import (
    HANG,
    Answer,
    FailingServer,
    Thought,
    answer,
    certificate,
    chat,
    delta,
    event,
    failing_server,
)
from toolchain.base.errors import FetchError, UsageError

KEY = "sk-very-secret-0123456789"
HELLO = [{"role": "user", "content": "hello"}]
LLAMA = {"id": "tiny", "owned_by": "llamacpp", "meta": {"n_ctx": 4096, "n_ctx_train": 8192}}


@contextmanager
def connected(
    *script: Answer, model: str | None = None, api_key: str | None = None, **how: Any
) -> Iterator[tuple[Backend, FailingServer]]:
    timeout_s = how.pop("timeout_s", 30.0)
    with failing_server(*script, **how) as server:
        backend = connect(server.url, model=model, api_key=api_key, timeout_s=timeout_s)
        try:
            yield backend, server
        finally:
            backend.close()


def options(*, max_tokens: int | None = None, **sampling: Any) -> ReplyOptions:
    return ReplyOptions(sampling=SamplingOptions(**{"seed": 7, **sampling}), max_tokens=max_tokens)


def reply(backend: Backend, how: ReplyOptions | None = None, messages: Sequence[Any] = HELLO) -> tuple[str, Figures]:
    pieces = list(backend.reply(messages, how or options(), Interrupt()))
    figures = pieces[-1].figures
    assert figures is not None
    assert not any(piece.figures for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces), figures


def sse(*parts: Any) -> Answer:
    return Answer(parts)


def said(text: str) -> bytes:
    return event(delta(content=text))


END = event(delta("stop")) + event("[DONE]")


def test_reply_streams_and_figures_are_the_servers() -> None:
    usage = {"prompt_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}}
    timings = {"prompt_per_second": 250.0, "predicted_per_second": 40.5}
    with connected(chat("Hello ", "wörld", usage=usage, timings=timings)) as (backend, server):
        pieces = list(backend.reply(HELLO, options(), Interrupt()))
    assert [piece.text for piece in pieces] == ["Hello ", "wörld", ""]
    figures = pieces[-1].figures
    assert figures is not None
    assert (figures.prompt_tokens, figures.cached_tokens, figures.completion_tokens) == (12, 8, 5)
    assert (figures.prompt_tps, figures.generation_tps, figures.finish_reason) == (250.0, 40.5, "stop")
    assert figures.ttft_ms is not None
    assert figures.ttft_ms > 0
    asked = server.chats[0].json()
    assert asked["model"] == "scripted"
    assert asked["messages"] == HELLO
    assert asked["stream"] is True
    assert asked["stream_options"] == {"include_usage": True}


def test_speed_comes_from_our_clock_where_the_server_tells_none() -> None:
    with connected(chat("a", "b", "c", pause_s=0.05, usage={"completion_tokens": 3})) as (backend, _):
        _, figures = reply(backend)
    assert figures.generation_tps is not None
    assert figures.generation_tps > 0
    assert figures.prompt_tokens is None
    assert figures.prompt_tps is None


def test_nonsense_figures_are_left_out() -> None:
    usage = {"prompt_tokens": -3, "completion_tokens": "many", "prompt_tokens_details": None}
    with connected(chat("a", usage=usage, timings={"predicted_per_second": True})) as (backend, _):
        _, figures = reply(backend)
    assert (figures.prompt_tokens, figures.completion_tokens, figures.generation_tps) == (None, None, None)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_comes_apart_from_the_answer(name: str) -> None:
    script = chat(Thought("let me", name), Thought(" think", name), "yes <thi", "nk>again</think>and no")
    with connected(script) as (backend, _):
        pieces = list(backend.reply(HELLO, options(), Interrupt()))
    assert "".join(piece.text for piece in pieces) == "yes and no"
    assert "".join(piece.reasoning for piece in pieces) == "let me thinkagain"


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_finish_reason_is_the_servers_word(finish: str) -> None:
    with connected(chat("a", finish=finish)) as (backend, _):
        assert reply(backend)[1].finish_reason == finish


CUT_ANYWHERE = "data: " + json.dumps(delta(content="wörld 👋"), ensure_ascii=False) + "\n\n"
FORMS = {
    "CRLF": (said("ok").replace(b"\n", b"\r\n"), END),
    "CR": (said("ok").replace(b"\n", b"\r"), END.replace(b"\n", b"\r")),
    "CRLF cut in two": (said("ok").replace(b"\n\n", b"\r"), b"\n\r", b"\n" + END),
    "BOM": (b"\xef\xbb\xbf" + said("ok"), END),
    "comments": (b": ping\n\n:\n", said("o"), b": still here\n\n", said("k"), END),
    "no blank lines": (said("o").replace(b"\n\n", b"\n"), said("k").replace(b"\n\n", b"\n"), b"data: [DONE]\n"),
    "no space": (said("ok").replace(b"data: ", b"data:"), END),
    "no line end at the end": (said("ok"), b"data: [DONE]"),
    "other fields": (b"event: message\nid: 1\nretry: 3\n" + said("ok"), END),
    "several lines of data": (
        b'data: {"choices": [{"delta":\ndata: {"content": "ok"}}]}\n\n',
        END,
    ),
    "empty choices": (event({"choices": []}), said("ok"), event({"choices": None}), END),
    "null everywhere": (
        event(delta(content=None)),
        event({"choices": [None]}),
        event({"usage": None}),
        said("ok"),
        END,
    ),
    "tool calls": (event(delta(tool_calls=[{"function": {"name": "look", "arguments": "{"}}])), said("ok"), END),
    "other choices": (event({"choices": [{"index": 1, "delta": {"content": "no"}}]}), said("ok"), END),
    "parts": (event(delta(content=[{"type": "text", "text": "ok"}])), END),
    "refusal": (event(delta(refusal="ok")), END),
    "end of the stream instead of [DONE]": (said("ok"), event(delta("stop"))),
    "[DONE] instead of a reason": (said("ok"), event("[DONE]")),
    "garbage": (b"<garbage>\n", b"data: {cut\n\n", said("ok"), END),
    "deep garbage": (b"data: " + b"[" * 100_000 + b"\n\n", said("ok"), END),
}


@pytest.mark.parametrize("form", FORMS)
def test_stream_is_understood_in_the_form(form: str) -> None:
    with connected(sse(*FORMS[form])) as (backend, _):
        text, figures = reply(backend)
    assert (text, figures.finish_reason) == ("ok", "stop")


def test_characters_may_be_cut_anywhere() -> None:
    raw = CUT_ANYWHERE.encode() + END
    with connected(sse(*(raw[at : at + 1] for at in range(len(raw))))) as (backend, _):
        assert reply(backend)[0] == "wörld 👋"


def test_halves_of_a_character_are_joined_and_lonely_ones_replaced() -> None:
    with connected(sse(said("a\ud83d"), said("\udc4b b\ud83d"), said("c"), said("\ud83d"), END)) as (backend, _):
        assert reply(backend)[0] == "a👋 b\ufffdc\ufffd"


def test_garbage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with connected(sse(b"data: {cut\n\n", said("ok"), END)) as (backend, _):
        reply(backend)
    assert "made no sense" in capsys.readouterr().err


def test_server_that_does_not_stream_is_understood() -> None:
    message = {"role": "assistant", "content": "whole", "reasoning_content": "hm"}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    with connected(answer(body=whole)) as (backend, _):
        text, figures = reply(backend)
    assert (text, figures.finish_reason, figures.completion_tokens) == ("whole", "stop", 1)


def test_what_follows_the_end_is_not_waited_for() -> None:
    with connected(sse(said("ok"), END, HANG)) as (backend, server):
        assert reply(backend)[0] == "ok"
        assert server.chats[0].left.wait(10)


def test_interrupt_ends_a_reply_between_tokens_and_the_server_sees_it() -> None:
    with connected(chat(*["word "] * 10_000, pause_s=0.01)) as (backend, server):
        interrupt, pieces = Interrupt(), []
        for piece in backend.reply(HELLO, options(), interrupt):
            pieces.append(piece)
            interrupt.raised = len(pieces) >= 3
        assert [piece.text for piece in pieces] == ["word ", "word ", "word ", ""]
        assert pieces[-1].figures is not None
        assert pieces[-1].figures.finish_reason == "cancelled"
        assert server.chats[0].left.wait(10)


@pytest.mark.parametrize(
    "silent", [chat("first", HANG), Answer((), before_s=60.0), answer(503, headers={"Retry-After": "50"})]
)
def test_interrupt_ends_a_reply_while_the_server_is_silent(silent: Answer) -> None:
    with connected(silent, timeout_s=600.0) as (backend, server):
        interrupt = Interrupt()
        threading.Timer(0.2, lambda: setattr(interrupt, "raised", True)).start()
        pieces = list(backend.reply(HELLO, options(), interrupt))
        assert pieces[-1].figures is not None
        assert pieces[-1].figures.finish_reason == "cancelled"
        assert silent.status == 503 or server.chats[0].left.wait(10)


def test_stopped_reply_has_the_figures_that_came_with_its_chunks() -> None:
    timings = {"prompt_n": 3, "cache_n": 9, "predicted_n": 1, "predicted_per_second": 20.0}
    with connected(sse(event({**delta(content="a"), "timings": timings}), HANG), models=[LLAMA]) as (backend, server):
        interrupt, pieces = Interrupt(), list[Piece]()
        for piece in backend.reply(HELLO, options(), interrupt):
            pieces.append(piece)
            interrupt.raised = True
        assert server.chats[0].json()["timings_per_token"] is True
    figures = pieces[-1].figures
    assert figures is not None
    assert (figures.prompt_tokens, figures.cached_tokens, figures.completion_tokens) == (12, 9, 1)


def test_reply_that_nobody_reads_on_is_ended() -> None:
    with connected(chat(*["word "] * 10_000, pause_s=0.01)) as (backend, server):
        pieces = backend.reply(HELLO, options(), Interrupt())
        next(pieces)
        pieces.close()
        assert server.chats[0].left.wait(10)


def test_only_model_is_chosen_and_several_are_listed() -> None:
    with connected(chat("a")) as (backend, _):
        assert backend.name == "scripted"
    with failing_server(models=("alpha", "beta")) as server, pytest.raises(UsageError, match="2 models") as raised:
        connect(server.url, model=None, api_key=None)
    assert raised.value.evidence == "alpha\nbeta"
    assert "--endpoint-model alpha" in raised.value.hint
    with connected(chat("a"), models=("alpha", "beta"), model="beta") as (backend, server):
        reply(backend)
        assert server.chats[0].json()["model"] == "beta"


def test_chat_goes_on_with_another_model_of_the_server() -> None:
    with connected(chat("one"), chat("two"), models=("alpha", "beta"), model="alpha") as (backend, server):
        talk = Talk(backend, options())
        list(talk.ask("hello"))
        assert other_model(talk, "") == "alpha; the server also has beta"
        assert "the conversation stays" in other_model(talk, "beta")
        list(talk.ask("and now?"))
        asked = server.chats[1].json()
        assert asked["model"] == "beta"
        assert [message["content"] for message in asked["messages"]] == ["hello", "one", "and now?"]


def test_adapters_of_a_llama_server_are_asked_for_by_name_or_id() -> None:
    listing = [{"id": 0, "path": "/models/poet.gguf", "scale": 1.0}, {"id": 1, "path": "law.gguf", "scale": 0}]
    served = {"GET /lora-adapters": answer(body=[*listing, {"id": "x"}, 3])}
    with connected(*(chat("a") for _ in range(3)), models=[LLAMA], others=served) as (backend, server):
        talk = Talk(backend, options())
        assert adapters(talk, "") == "0 poet.gguf at 1\n1 law.gguf at 0"
        list(talk.ask("hello"))
        assert adapters(talk, "law.gguf=0.5") == "0 poet.gguf at 1\n1 law.gguf at 0.5"
        assert adapters(talk, "-0") == "0 poet.gguf at 0\n1 law.gguf at 0.5"
        list(talk.ask("and now?"))
        with pytest.raises(UsageError, match="no adapter 2"):
            adapters(talk, "2=1")
        asked = [each.json().get("lora") for each in server.chats]
        assert asked == [None, [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.5}]]
    with connected() as (backend, _), pytest.raises(UsageError, match="is no llama-server"):
        adapters(Talk(backend, options()), "")


def test_model_that_is_not_listed_is_asked_for_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with connected(chat("a"), models=("Qwen3-8B", "other"), model="qwen-8b") as (backend, _):
        assert backend.name == "qwen-8b"
    assert "did you mean Qwen3-8B?" in capsys.readouterr().err


def test_unknown_model_names_the_near_one() -> None:
    refusal = answer(404, {"error": {"message": "The model `alpa` does not exist", "code": "model_not_found"}})
    with (
        connected(refusal, models=("alpha", "beta"), model="alpa") as (backend, _),
        pytest.raises(FetchError, match=r"has no model alpa \(did you mean alpha\?\)"),
    ):
        reply(backend)


@pytest.mark.parametrize(
    ("url", "goes"),
    [
        ("https://api.openai.com", True),
        ("https://api.openai.com/v1", True),
        ("HTTPS://API.OpenAI.com/v1/", True),
        ("http://api.openai.com/v1", False),
        ("https://api.openai.com.example.org/v1", False),
        ("https://api.openai.com:8443/v1", False),
        ("https://example.org/https://api.openai.com/v1", False),
    ],
)
def test_key_of_openai_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch, url: str, goes: bool) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    monkeypatch.delenv("FOUNDRY_API_KEY", raising=False)
    assert key_for(url) == ("theirs" if goes else None)
    monkeypatch.setenv("FOUNDRY_API_KEY", "ours")
    assert key_for(url) == "ours"


@pytest.mark.parametrize(
    "listing", [answer(403), answer(404), answer(405), answer(200, "<html>welcome</html>"), answer(200, [1])]
)
def test_server_without_a_list_is_used_with_a_named_model(listing: Answer) -> None:
    with connected(chat("a"), models=listing, model="mine") as (backend, _):
        assert (reply(backend)[0], backend.name, backend.n_ctx, backend.sees) == ("a", "mine", None, True)


def test_server_without_a_list_asks_for_a_name() -> None:
    with failing_server(models=answer(404)) as server, pytest.raises(UsageError) as raised:
        connect(server.url, model=None, api_key=None)
    assert "--endpoint-model" in raised.value.hint


def test_context_and_eyes_are_what_the_server_tells() -> None:
    props = {"default_generation_settings": {"n_ctx": 2048}, "modalities": {"vision": False}}
    with connected(chat("a"), models=[LLAMA], props=props) as (backend, _):
        assert (backend.n_ctx, backend.sees) == (2048, False)
    with connected(chat("a"), models=[LLAMA]) as (backend, _):
        assert (backend.n_ctx, backend.sees) == (4096, True)
    with connected(chat("a"), models=[{"id": "v", "max_model_len": 777}]) as (backend, _):
        assert (backend.n_ctx, backend.sees) == (777, True)
    entry = {"id": "o", "context_length": 9, "architecture": {"input_modalities": ["text"]}}
    with connected(chat("a"), models=[entry]) as (backend, _):
        assert (backend.n_ctx, backend.sees) == (9, False)


def test_model_may_be_named_by_its_alias(capsys: pytest.CaptureFixture[str]) -> None:
    models = [{**LLAMA, "aliases": ["small"]}, {"id": "large", "owned_by": "llamacpp"}]
    with connected(chat("a"), models=models, model="small") as (backend, server):
        assert (backend.name, backend.n_ctx) == ("small", 4096)
        assert not any(asked.path == "/props" for asked in server.requests)  # a router would load a model for it
    assert capsys.readouterr().err == ""


def test_prompt_is_counted_by_a_llama_server_and_by_no_other() -> None:
    counting = {"POST /v1/chat/completions/input_tokens": answer(body={"input_tokens": 21})}
    with connected(models=[LLAMA], others=counting) as (backend, _):
        assert backend.count(HELLO) == 21
    with connected(models=[LLAMA]) as (backend, server):
        assert backend.count(HELLO) is None
        asked = len(server.requests)
        assert backend.count(HELLO) is None
        assert len(server.requests) == asked
    with connected(others=counting) as (backend, _):
        assert backend.count(HELLO) is None


def test_llama_server_is_told_all_sampling_options() -> None:
    with connected(chat("a"), models=[LLAMA]) as (backend, server):
        reply(backend, options(max_tokens=9, typical=0.9, logit_bias={5: float("-inf"), 6: 1.5}))
        asked = server.chats[0].json()
    assert (asked["temperature"], asked["top_k"], asked["min_p"], asked["seed"]) == (0.8, 40, 0.05, 7)
    assert (asked["typical_p"], asked["max_tokens"]) == (0.9, 9)
    assert asked["logit_bias"] == {"5": False, "6": 1.5}


def test_other_servers_are_told_what_differs_from_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with connected(chat("a")) as (backend, server):
        reply(backend, options(temp=0.2, frequency_penalty=0.5, logit_bias={5: float("-inf")}))
        asked = server.chats[0].json()
        assert (asked["temperature"], asked["frequency_penalty"], asked["logit_bias"]) == (0.2, 0.5, {"5": -100})
        assert not {"timings_per_token", "top_k", "min_p", "repeat_penalty", "top_p", "max_tokens"} & set(asked)
        assert capsys.readouterr().err == ""
        reply(backend, options(top_k=5))
        reply(backend, options(top_k=5))
        assert server.chats[1].json()["top_k"] == 5
    assert capsys.readouterr().err.count("top_k") == 1


def test_schema_goes_as_response_format_and_its_grammar_does_not() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    how = ReplyOptions(sampling=SamplingOptions(grammar="root ::= x"), stops=("END",), json_schema=json.dumps(schema))
    with connected(chat("{}")) as (backend, server):
        reply(backend, how)
        asked = server.chats[0].json()
    assert asked["response_format"]["json_schema"]["schema"] == schema
    assert asked["stop"] == ["END"]
    assert "grammar" not in asked


def test_grammar_needs_a_llama_server() -> None:
    with connected(chat("a")) as (backend, _), pytest.raises(UsageError, match="grammar"):
        reply(backend, options(grammar="root ::= x"))
    with connected(chat("a"), models=[LLAMA]) as (backend, server):
        reply(backend, options(grammar="root ::= x"))
        assert server.chats[0].json()["grammar"] == "root ::= x"


def test_images_go_as_parts() -> None:
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    with connected(chat("a")) as (backend, server):
        reply(backend, messages=[{"role": "user", "content": parts, "time": "ours alone"}])
        assert server.chats[0].json()["messages"] == [{"role": "user", "content": parts}]


def test_text_that_is_no_utf8_can_be_asked() -> None:
    with connected(chat("a")) as (backend, server):
        reply(backend, messages=[{"role": "user", "content": "cut \ud83d ünd"}])
        assert server.chats[0].json()["messages"][0]["content"] == "cut ? ünd"


REFUSALS = {
    "stream_options": {"error": {"message": "Unrecognized request argument supplied: stream_options"}},
    "seed": {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
    "temperature": {"error": {"message": "Unsupported value: 'temperature' does not support 0.2 with this model."}},
}


@pytest.mark.parametrize("field", REFUSALS)
def test_field_that_a_server_does_not_know_is_left_out(field: str) -> None:
    with connected(answer(400, REFUSALS[field]), chat("a")) as (backend, server):
        assert reply(backend, options(temp=0.2))[0] == "a"
        reply(backend, options(temp=0.2))
        asked = [field in one.json() for one in server.chats]
    assert asked == [True, False, False]


def test_refusal_without_words_is_taken_for_the_field_that_is_least_known() -> None:
    with connected(answer(422, b"", content_type=""), chat("a")) as (backend, server):
        assert reply(backend)[0] == "a"
        assert "stream_options" not in server.chats[1].json()


def test_limit_is_named_as_newer_models_want_it() -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    with connected(answer(400, {"error": {"message": words}}), chat("a")) as (backend, server):
        reply(backend, options(max_tokens=5))
        assert server.chats[1].json()["max_completion_tokens"] == 5


def test_what_a_reply_cannot_do_without_is_not_left_out() -> None:
    words = {"error": {"message": "response_format is not supported"}}
    how = ReplyOptions(sampling=SamplingOptions(), json_schema="{}")
    with connected(answer(400, words)) as (backend, server), pytest.raises(FetchError):
        reply(backend, how)
    assert all("response_format" in one.json() for one in server.chats)


@pytest.mark.parametrize(
    ("typed", "path"), [("", ""), ("/", ""), ("/v1", "/v1"), ("/v1/", "/v1"), ("/v1/chat/completions", "/v1")]
)
def test_address_may_be_given_in_many_forms(typed: str, path: str) -> None:
    with failing_server(chat("a")) as server:
        backend = connect(f"http://127.0.0.1:{server.port}{typed}", model=None, api_key=None)
        assert reply(backend)[0] == "a"
        assert server.chats[0].path == "/v1/chat/completions"


@pytest.mark.parametrize("prefix", ["/proxy/v1", "/api/v4", "/bare", ""])
def test_api_may_lie_elsewhere(prefix: str) -> None:
    with failing_server(chat("a"), prefix=prefix) as server:
        assert reply(connect(server.url, model=None, api_key=None))[0] == "a"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_place_that_nobody_tells_is_found_by_asking(prefix: str) -> None:
    with failing_server(chat("a"), prefix=prefix, models=answer(404)) as server:
        backend = connect(f"http://127.0.0.1:{server.port}", model="m", api_key=None)
        assert reply(backend)[0] == "a"
        reply(backend)
        assert server.chats[-1].path == f"{prefix}/chat/completions"
        assert len(server.chats) == (2 if prefix else 3)


WRONG = {
    "localhost:8080": "http://localhost:8080",
    "api.example.com/v1": "https://api.example.com/v1",
    "ftp://127.0.0.1/v1": "http://127.0.0.1/v1",
    "https://user:hunter2@api.example.com/v1": "https://api.example.com/v1",
    "user:hunter2@localhost:1": "http://localhost:1",
    "https://api.example.com/v1?key=hunter2": "https://api.example.com/v1",
    "http://127.0.0.1:99999": "http://127.0.0.1:8080",
    "http://": "http://127.0.0.1:8080",
    "http://a b": "http://127.0.0.1:8080",
    "http://[::1": "http://127.0.0.1:8080",
    "http://127.0.0.1\\@evil.example": "http://127.0.0.1:8080",
    "": "http://127.0.0.1:8080",
}


@pytest.mark.parametrize("url", WRONG)
def test_wrong_address_is_told_with_the_right_form(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        connect(url, model=None, api_key=None)
    assert WRONG[url] in raised.value.hint
    assert "hunter2" not in f"{raised.value.message}{raised.value.evidence}{raised.value.hint}{raised.value.__cause__}"


def test_key_is_sent_and_nowhere_shown(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    echo = answer(401, {"error": {"message": f"wrong key: {KEY[:9]}\x00{KEY[9:]} {KEY} {KEY[:-5]}**"}})
    busy = answer(503, {"error": {"message": KEY}}, headers={"Retry-After": "0"})
    caplog.set_level(logging.DEBUG)
    with connected(busy, echo, api_key=f" {KEY}\n") as (backend, server), pytest.raises(FetchError) as raised:
        reply(backend)
    assert server.chats[0].headers["authorization"] == f"Bearer {KEY}"
    error = raised.value
    assert "refused the key" in error.message
    assert "<key>" in error.evidence
    assert error.__cause__ is None
    assert error.__context__ is None
    told = capsys.readouterr()
    assert KEY[:8] not in error.evidence
    for text in (repr(backend), repr(vars(backend)), error.message, error.evidence, error.hint, caplog.text, *told):
        assert KEY not in text


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "ünïcode"])
def test_key_that_cannot_be_one_is_refused_unseen(key: str) -> None:
    with pytest.raises(UsageError) as raised:
        connect("http://127.0.0.1:1", model=None, api_key=key)
    assert key not in str(raised.value)


@pytest.mark.parametrize("host", ["192.0.2.1", "api.example.com", "localhost.example.com", "0.0.0.0"])
def test_key_does_not_go_over_plain_http(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOUNDRY_ALLOW_PLAIN_HTTP", raising=False)
    with pytest.raises(UsageError, match="plain http") as raised:
        connect(f"http://{host}/v1", model="m", api_key=KEY)
    assert "FOUNDRY_ALLOW_PLAIN_HTTP=1" in raised.value.hint
    assert KEY not in raised.value.hint


def test_key_is_not_sent_on_by_a_redirect() -> None:
    with failing_server(chat("stolen")) as other:
        elsewhere = answer(307, headers={"Location": f"{other.url}/chat/completions?x=1"})
        with connected(elsewhere, api_key=KEY) as (backend, _), pytest.raises(FetchError) as raised:
            reply(backend)
        assert not other.requests
    assert other.url in raised.value.hint


def test_what_is_on_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with failing_server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with connected(chat("a"), api_key=KEY) as (backend, _):
            assert reply(backend)[0] == "a"
        assert not proxy.requests


def test_https_works_with_a_trusted_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(certificate())
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    with connected(chat("a"), chat("b", HANG), tls=True, api_key=KEY) as (backend, server):
        assert reply(backend)[0] == "a"
        interrupt, pieces = Interrupt(), list[Piece]()
        for piece in backend.reply(HELLO, options(), interrupt):
            pieces.append(piece)
            interrupt.raised = True
        assert [piece.text for piece in pieces] == ["b", ""]
        assert server.chats[1].left.wait(10)
