"""Servers that fail in every way HTTP can: each failure is a sentence, its evidence and a next step."""

from __future__ import annotations

import email.utils
import gzip
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

import pytest

from runtime.chat.backend import Backend, ContextFullError, Piece, ReplyOptions
from runtime.chat.endpoint import ask, connect, wire
from runtime.chat.endpoint import reply as reply_module
from runtime.engine.sampling import SamplingOptions
from runtime.interrupts import Interrupt
from tests.failing_server import (
    CLOSE,
    HANG,
    RESET,
    Answer,
    FailingServer,
    Repeated,
    answer,
    chat,
    delta,
    event,
    failing_server,
)
from toolchain.base.errors import FetchError

HELLO = [{"role": "user", "content": "hello"}]
SOON = {"Retry-After": "0"}
TEXT = event(delta(content="some text"))


@contextmanager
def connected(*script: Answer, timeout_s: float = 30.0, **how: Any) -> Iterator[tuple[Backend, FailingServer]]:
    with failing_server(*script, **how) as server:
        backend = connect(server.url, model="scripted", api_key=None, timeout_s=timeout_s)
        try:
            yield backend, server
        finally:
            backend.close()


def reply(backend: Backend, pieces: list[Piece] | None = None) -> str:
    """The text of the reply; what comes before a failure is in ``pieces``."""
    pieces = [] if pieces is None else pieces
    for piece in backend.reply(HELLO, ReplyOptions(sampling=SamplingOptions(seed=1)), Interrupt()):
        pieces.append(piece)
    return "".join(piece.text for piece in pieces)


def failure(script: Answer, **how: Any) -> FetchError:
    """The error of a reply by this script; it is told whole, with nothing of ours hidden in it."""
    with connected(script, **how) as (backend, _), pytest.raises(FetchError) as raised:
        reply(backend)
    error = raised.value
    assert error.message
    assert error.hint
    assert error.exit_code == 4
    assert error.__cause__ is None
    assert error.__context__ is None or not vars(error.__context__)  # a request or an answer would hold secrets
    assert len(f"{error.evidence}") < 1000
    return error


STATUSES = {
    400: ("does not understand", "words above"),
    401: ("wants a key", "environment"),
    402: ("no credit", "billing"),
    403: ("does not allow", "key may do"),
    404: ("no chat completions", "/v1"),
    405: ("no chat completions", "/v1"),
    408: ("patience", "again"),
    413: ("so large", "smaller"),
    418: ("HTTP 418", "address"),
    422: ("does not understand", "words above"),
    429: ("limit is reached", "later"),
    500: ("failed inside", "log"),
    502: ("HTTP 502", "later"),
    503: ("HTTP 503", "later"),
    504: ("behind it", "again"),
    529: ("HTTP 529", "log"),
}


@pytest.mark.parametrize("status", STATUSES)
def test_status_is_told_with_the_servers_own_words(status: int) -> None:
    words = {"error": {"message": f"\x1b[31mbecause\x07 of\u202e {status}", "code": "some"}}
    error = failure(answer(status, words, headers=SOON))
    sentence, hint = STATUSES[status]
    assert sentence in error.message
    assert hint in error.hint
    assert error.evidence.endswith(f"/v1/chat/completions: HTTP {status}: [31mbecause of {status}")


ERROR_FORMS: dict[str, object] = {
    "OpenAI": {"error": {"message": "the reason"}},
    "a text": {"error": "the reason"},
    "plain": {"message": "the reason"},
    "FastAPI": {"detail": "the reason"},
    "pydantic": {"detail": [{"loc": ["body", "x"], "msg": "the reason"}]},
    "Google": [{"error": {"message": "the reason", "status": "X"}}],
    "text": "the reason",
}


@pytest.mark.parametrize("form", ERROR_FORMS)
def test_words_are_found_in_any_form_of_error(form: str) -> None:
    assert "the reason" in failure(answer(403, ERROR_FORMS[form])).evidence


@pytest.mark.parametrize("body", ["<html>" + "x" * 100_000, "\x00" * 100_000, "{" * 100_000, "", '{"error": null}'])
def test_any_body_of_an_error_is_bounded(body: str) -> None:
    assert "HTTP 403" in failure(answer(403, body)).evidence


def test_wrong_path_suggests_the_usual_one() -> None:
    with failing_server() as server:
        backend = connect(f"http://127.0.0.1:{server.port}/api/v9", model="m", api_key=None)
        with pytest.raises(FetchError, match="no chat completions") as raised:
            reply(backend)
    assert f"--endpoint http://127.0.0.1:{server.port}/api/v1" in raised.value.hint


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_busy_server_is_asked_again(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with connected(answer(status, headers=SOON), answer(status, headers=SOON), chat("at last")) as (backend, server):
        assert reply(backend) == "at last"
        assert len(server.chats) == 3
    assert capsys.readouterr().err.count("asking again") == 2


def test_busy_server_is_asked_again_a_few_times_only() -> None:
    with connected(answer(503, headers=SOON)) as (backend, server), pytest.raises(FetchError, match="busy"):
        reply(backend)
    assert len(server.chats) == ask.TRIES


def test_waits_grow_where_the_server_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ask, "_sleep", lambda seconds, _: waits.append(seconds))
    with connected(answer(503)) as (backend, _), pytest.raises(FetchError):
        reply(backend)
    assert waits == [1, 2, 4]


def test_date_to_come_back_at_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ask, "_sleep", lambda seconds, _: waits.append(seconds))
    later = {"Retry-After": email.utils.formatdate(time.time() + 40, usegmt=True)}
    with connected(answer(429, headers=later), chat("a")) as (backend, _):
        assert reply(backend) == "a"
    assert 10 < waits[0] <= 40


@pytest.mark.parametrize("asked", ["86400", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_long_wait_is_told_instead_of_slept(asked: str) -> None:
    with (
        connected(answer(429, headers={"Retry-After": asked})) as (backend, server),
        pytest.raises(FetchError) as raised,
    ):
        reply(backend)
    assert len(server.chats) == 1
    assert "ask again in" in raised.value.hint


@pytest.mark.parametrize("asked", ["soon", "-1", "nan", "Fri, 99 Foo"])
def test_wait_that_makes_no_sense_is_not_taken(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "FIRST_WAIT_S", 0.001)
    with connected(answer(429, headers={"Retry-After": asked}), chat("a")) as (backend, _):
        assert reply(backend) == "a"


def test_account_without_credit_is_not_asked_again() -> None:
    empty = answer(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
    with connected(empty) as (backend, server), pytest.raises(FetchError, match="no credit"):
        reply(backend)
    assert len(server.chats) == 1


@pytest.mark.parametrize(
    "words",
    [
        {"error": {"code": 400, "message": "request (99) exceeds", "type": "exceed_context_size_error"}},
        {"error": {"message": "This model's maximum context length is 8 tokens", "code": "context_length_exceeded"}},
    ],
)
def test_conversation_that_is_too_long_has_an_error_of_its_own(words: object) -> None:
    assert isinstance(failure(answer(400, words)), ContextFullError)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_told_with_where_it_points(status: int) -> None:
    where = {"Location": "https://other.example/v1/chat/completions"}
    assert "--endpoint https://other.example/v1" in failure(answer(status, b"", headers=where)).hint


@pytest.mark.parametrize("where", ["", "javascript:x", "https://a:b@other.example/", "http://[::1"])
def test_redirect_to_nowhere_is_told(where: str) -> None:
    assert "HTTP 302" in failure(answer(302, b"", headers={"Location": where})).message


def test_nothing_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(FetchError, match="nothing listens") as raised:
        connect(f"http://127.0.0.1:{port}", model="m", api_key=None)
    assert "refused" in raised.value.evidence


def test_host_of_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FetchError, match="no host of the name"):
        connect("http://nowhere.invalid", model="m", api_key=None)


def test_certificate_that_nobody_trusts_is_refused() -> None:
    with failing_server(tls=True) as server, pytest.raises(FetchError, match="not trusted") as raised:
        connect(server.url, model="m", api_key="key")
    assert "SSL_CERT_FILE" in raised.value.hint
    assert not server.requests


def test_server_without_tls_is_told() -> None:
    with failing_server() as server, pytest.raises(FetchError, match="TLS") as raised:
        connect(server.url.replace("http://", "https://"), model="m", api_key=None)
    assert server.url in raised.value.hint


def test_host_that_takes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CONNECT_S", 0.2)
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = [socket.socket() for _ in range(3)]
    try:
        for one in waiting:  # a full backlog takes no more
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        with pytest.raises(FetchError, match="did not accept a connection"):
            connect(f"http://127.0.0.1:{full.getsockname()[1]}", model="m", api_key=None)
    finally:
        for one in (*waiting, full):
            one.close()


def test_silence_has_a_bound() -> None:
    assert "silent for 0.3 s" in failure(Answer((), before_s=60.0), timeout_s=0.3).message
    assert "silent for 0.3 s" in failure(chat("a", HANG), timeout_s=0.3).message


def test_heartbeats_are_signs_of_life() -> None:
    beats = [part for _ in range(30) for part in (b": ping\n\n", 0.05)]
    with connected(Answer((*beats, TEXT, event(delta("stop")))), timeout_s=1.0) as (backend, _):
        assert reply(backend) == "some text"


@pytest.mark.parametrize("nothing", [b": ping\n\n", event({}), b"data: \n\n", b"x"])
def test_heartbeats_alone_are_no_reply(nothing: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply_module, "_HEARTBEATS", 0.1)
    beats = [part for _ in range(600) for part in (nothing, 0.02)]
    assert "nothing else" in failure(Answer(beats), timeout_s=5.0).message


def test_pause_of_the_reader_is_no_silence_of_the_server() -> None:
    with connected(Answer((TEXT, 0.8, TEXT, 0.1, event(delta("stop")))), timeout_s=0.7) as (backend, _):
        pieces = backend.reply(HELLO, ReplyOptions(sampling=SamplingOptions(seed=1)), Interrupt())
        assert next(pieces).text == "some text"
        time.sleep(0.75)
        assert [piece.text for piece in pieces] == ["some text", ""]


def test_drip_of_a_head_has_the_bound_of_silence() -> None:
    drip = [part for letter in "HTTP/1.1 200 OK\r\nX: " + "x" * 500 for part in (letter.encode(), 0.02)]
    assert "silent" in failure(Answer(drip, framing="raw"), timeout_s=0.3).message


def test_drip_of_a_short_answer_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    drip = [part for _ in range(500) for part in (b" ", 0.02)]
    slow = Answer(drip, content_type="application/json", framing="close")
    assert "too long for a short answer" in failure(slow, timeout_s=0.3).message
    monkeypatch.setattr(ask, "_ERROR_S", 0.2)
    assert "HTTP 403" in failure(Answer(drip, status=403, framing="close")).evidence


FLOODS = {
    "a line": (b"data: ", Repeated(b"x" * 65536, 1600)),
    "comments": (Repeated(b": ping\n" * 9000, 1600),),
    "lines of data": (Repeated(b"data: xxxxxxxxxx\n" * 4000, 1600),),
    "events of garbage": (Repeated(b"data: x\n\n" * 7000, 1600),),
    "line ends": (Repeated(b"\n" * 65536, 1600),),
    "garbage": (Repeated(b"x\r" * 32000, 1600),),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_flood_is_refused_before_a_hundred_megabytes_came(flood: str) -> None:
    with connected(Answer(FLOODS[flood])) as (backend, server):
        with pytest.raises(FetchError, match="more than a reply can be"):
            reply(backend)
        assert server.chats[0].left.wait(10)


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_short_answer_that_does_not_end_is_refused(framing: Any) -> None:
    endless = Answer((b"{", Repeated(b" " * 65536)), content_type="application/json", framing=framing)
    assert "more than an answer can be" in failure(endless).message
    assert "HTTP 403" in failure(Answer((Repeated(b"x" * 65536),), status=403, framing=framing)).evidence
    with failing_server(models=endless) as server, pytest.raises(FetchError, match="more than an answer can be"):
        connect(server.url, model="m", api_key=None)


def test_promises_without_end_have_the_bound_of_silence() -> None:
    promises = Answer((Repeated(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),), framing="raw")
    assert "silent" in failure(promises, timeout_s=0.3).message


def test_head_without_end_is_refused() -> None:
    error = failure(Answer((b"HTTP/1.1 200 OK\r\n", Repeated(b"X: y\r\n" * 1000)), framing="raw"))
    assert "does not speak HTTP" in error.message


@pytest.mark.parametrize("nonsense", [b"SSH-2.0-OpenSSH_9\r\n\r\n", b"\x00\x01\x02\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n"])
def test_what_is_no_http_is_told(nonsense: bytes) -> None:
    assert "does not speak HTTP" in failure(Answer((nonsense, CLOSE), framing="raw")).message


def test_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    packed = Answer((bomb,), headers={"Content-Encoding": "gzip"}, content_type="application/json", framing="length")
    assert "compressed" in failure(packed).message
    refusal = Answer((bomb,), status=403, headers={"Content-Encoding": "gzip"}, framing="length")
    assert "HTTP 403" in failure(refusal).evidence


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (answer(200, "<!doctype html><title>Log in</title>"), "web page"),
        (Answer((b"<html>",), content_type=""), "web page"),
        (answer(200, b'{"choices": [{"mess', content_type="application/json"), "not whole"),
        (answer(200, b"OK", content_type="application/json"), "makes no sense"),
        (Answer((b"OK",), content_type="text/plain"), "makes no sense"),
        (answer(200, [1, 2]), "not whole"),
        (answer(200, b""), "empty answer"),
        (answer(200, {"object": "list"}), "without a reply"),
        (answer(204, b""), "empty answer"),
        (Answer((event("what?"),)), "makes no sense"),
    ],
)
def test_body_that_is_no_reply_is_told(script: Answer, told: str) -> None:
    assert told in failure(script).message


@pytest.mark.parametrize("end", [RESET, CLOSE])
@pytest.mark.parametrize("text", ["", "some text"])
def test_connection_that_breaks_in_a_reply_is_told_and_nothing_is_repeated(end: str, text: str) -> None:
    with connected(chat(*([text] if text else []), 0.2, end)) as (backend, server):
        pieces: list[Piece] = []
        with pytest.raises(FetchError, match="broke"):
            reply(backend, pieces)
        assert "".join(piece.text for piece in pieces) == text
        assert len(server.chats) == 1


def test_connection_that_breaks_before_the_head_is_told() -> None:
    assert "broke" in failure(Answer((RESET,), framing="raw")).message
    assert "broke" in failure(Answer((CLOSE,), framing="raw")).message


def test_body_that_is_shorter_than_stated_is_told() -> None:
    assert "broke" in failure(Answer((TEXT,), headers={"Content-Length": "9999"}, framing="close")).message


def test_reply_that_has_ended_is_whole_however_the_connection_ends() -> None:
    for end in (RESET, CLOSE):
        with connected(Answer((TEXT, event(delta("stop")), 0.1, end))) as (backend, _):
            assert reply(backend) == "some text"


@pytest.mark.parametrize("text", ["", "some text"])
def test_stream_that_ends_early_is_told_and_what_came_is_kept(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = chat(*([text] if text else []), finish=None, done=False)
    if not text:
        assert "without a reply" in failure(script).message
        return
    with connected(script) as (backend, _):
        pieces: list[Piece] = []
        assert reply(backend, pieces) == text
        assert pieces[-1].figures is not None
        assert pieces[-1].figures.finish_reason == "ended early"
    assert "ended the reply early" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        event({"error": {"message": "out of\x1b memory", "code": 500}}),
        event({"error": "out of memory"}),
        b'error: {"message": "out of memory", "code": 500}\n\n',
        json.dumps({"error": {"message": "out of memory"}}).encode() + b"\n",
    ],
)
def test_error_within_a_stream_is_told_and_nothing_is_repeated(error: bytes) -> None:
    with connected(Answer((TEXT, error))) as (backend, server):
        pieces: list[Piece] = []
        with pytest.raises(FetchError, match="broke off") as raised:
            reply(backend, pieces)
        assert raised.value.evidence == "out of memory"
        assert len(server.chats) == 1
    assert [piece.text for piece in pieces] == ["some text"]


def test_error_with_the_status_of_success_is_told() -> None:
    assert failure(answer(200, {"error": {"message": "no such luck"}})).evidence == "no such luck"


def test_server_that_fails_once_answers_the_next_time() -> None:
    with connected(chat("a", RESET), chat("b")) as (backend, _):
        with pytest.raises(FetchError):
            reply(backend)
        assert reply(backend) == "b"


def test_busy_or_closed_server_is_told_at_connect() -> None:
    with failing_server(models=answer(503, headers=SOON)) as server, pytest.raises(FetchError, match="busy"):
        connect(server.url, model=None, api_key=None)
    with failing_server(models=answer(401)) as server, pytest.raises(FetchError, match="wants a key"):
        connect(server.url, model="m", api_key=None)


KEYS = [
    "choices",
    "delta",
    "message",
    "content",
    "finish_reason",
    "index",
    "usage",
    "timings",
    "error",
    "detail",
    "loc",
    "msg",
    "code",
    "type",
    "param",
]
MORE_KEYS = [
    "tool_calls",
    "function",
    "name",
    "reasoning",
    "thinking",
    "text",
    "id",
    "data",
    "models",
    "aliases",
    "meta",
    "n_ctx",
    "capabilities",
]


def anything(random: Random, depth: int = 4) -> Any:
    """A value in the shape of what servers say, with everything in it that JSON can hold anywhere."""
    if depth and random.random() < 0.7:
        if random.random() < 0.3:
            return [anything(random, depth - 1) for _ in range(random.randrange(3))]
        return {random.choice(KEYS + MORE_KEYS): anything(random, depth - 1) for _ in range(random.randrange(6))}
    return random.choice([None, True, 0, -1, 1e308, 10**30, "", "text", "stop", "\ud83d", [], {}])


@pytest.mark.parametrize("seed", range(10))
def test_any_json_is_a_reply_or_an_error_in_our_words(seed: int) -> None:
    random = Random(seed)
    script = []
    for _ in range(20):
        begin = {"choices": [{"delta": anything(random), "finish_reason": anything(random)}]}
        script += [Answer((event(begin), event(anything(random)), event(anything(random))))]
        script += [answer(random.choice([200, 400, 403, 404]), {**begin, "error": anything(random)})]
    with connected(*script, models=[{"id": "scripted", **{key: anything(random) for key in MORE_KEYS[8:]}}]) as both:
        for _ in script:
            with suppress(FetchError):
                reply(both[0]).encode("utf-8")
