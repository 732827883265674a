"""The front before a small server that stands where llama-server would."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from typing import Any

import aiohttp
import pytest

from runtime.serve.front import FrontConfig, make_app
from tests.loopback_llama import KEY, Child, Served, serving, until
from toolchain.base.errors import UsageError


def error_of(text: str) -> dict[str, object]:
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


# What passes, and how


def test_a_stream_passes_byte_for_byte() -> None:
    async def scene(it: Served) -> None:
        status, text, headers = await it.ask(n=3)
        assert status == 200
        assert headers["Content-Type"] == "text/event-stream"
        assert text == (
            'data: {"text": "0"}\n\ndata: {"text": "1"}\n\ndata: {"text": "2"}\n\n'
            'data: {"timings": {"predicted_n": 5}}\n\ndata: [DONE]\n\n'
        )

    serving(scene)


def test_an_event_is_there_before_the_next_one_exists() -> None:
    async def scene(it: Served) -> None:
        async with it.client.post("/v1/completions", json={"hold": True, "n": 2}) as reply:
            assert await reply.content.readany() == b'data: {"text": "0"}\n\n'
            assert it.child.running == 1
            it.child.release.set()
            assert (await reply.content.read()).endswith(b"data: [DONE]\n\n")

    serving(scene)


def test_status_and_body_of_a_plain_reply_pass() -> None:
    async def scene(it: Served) -> None:
        status, text, headers = await it.ask(stream=False, status=418)
        assert (status, json.loads(text)["text"]) == (418, "x")
        assert headers["Server"] == "llama-foundry"

    serving(scene)


def test_the_body_arrives_as_it_was_sent() -> None:
    async def scene(it: Served) -> None:
        body = json.dumps({"stream": False, "prompt": "é" * 3_000_000}).encode()

        async def pieces() -> object:
            for start in range(0, len(body), 100_000):
                yield body[start : start + 100_000]

        async with it.client.post("/v1/completions", data=pieces()) as reply:
            assert reply.status == 200
        assert it.child.seen[0].body == body
        assert it.child.seen[0].headers["Content-Length"] == str(len(body))
        assert "Transfer-Encoding" not in it.child.seen[0].headers

    serving(scene)


def test_the_query_passes_and_the_childs_cors_headers_do_not() -> None:
    async def scene(it: Served) -> None:
        status, _, headers = await it.get("/props?model=a%2Fb&x=1")
        assert status == 200
        assert it.child.seen[0].target == "/props?model=a%2Fb&x=1"
        assert "Access-Control-Allow-Origin" not in headers

    serving(scene)


def test_the_child_gets_its_own_key_and_nothing_meant_for_us() -> None:
    async def scene(it: Served) -> None:
        sent = {
            "Authorization": "Bearer mine",
            "X-Api-Key": "mine",
            "X-Forwarded-For": "1.2.3.4",
            "Forwarded": "for=1.2.3.4",
            "X-Conversation-Id": "goes on without me",
            "X-Hop": "1",
            "Connection": "x-hop, keep-alive",
            "Cookie": "a=b",
            "X-Kept": "yes",
        }
        async with it.client.post("/v1/completions", json={"stream": False}, headers=sent) as reply:
            assert reply.status == 200
        got = it.child.seen[0].headers
        assert got.pop("Authorization") == f"Bearer {KEY}"
        assert got.pop("X-Kept") == "yes"
        assert not {name.lower() for name in got} & {name.lower() for name in sent} - {"connection"}
        assert got["Host"] == it.child.base_url.removeprefix("http://")

    serving(scene, api_keys=frozenset({"mine"}))


# Who may ask


def test_foreign_hosts_and_origins_are_refused_before_anything_else() -> None:
    async def scene(it: Served) -> None:
        for headers in ({"Host": f"evil.example:{it.port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
            for path in ("/", "/health", "/v1/models"):
                status, text, sent = await it.get(path, **headers)
                assert status == 403
                assert error_of(text)["type"] == "permission_error"
                assert "Access-Control-Allow-Origin" not in sent
        status, _, _ = await it.get("/v1/models", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")
        assert status == 403
        assert it.child.seen == []

    serving(scene)


def test_an_allowed_page_may_ask_and_read() -> None:
    async def scene(it: Served) -> None:
        page = "https://app.example"
        asked = {"Origin": page, "Access-Control-Request-Headers": "authorization, x-stainless-os"}
        async with it.client.options("/v1/completions", headers=asked) as reply:
            assert reply.status == 204
            assert reply.headers["Access-Control-Allow-Origin"] == page
            assert reply.headers["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
            assert "POST" in reply.headers["Access-Control-Allow-Methods"]
        body = {"stream": False}
        headers = {"Origin": page, "Authorization": "Bearer k"}
        async with it.client.post("/v1/completions", json=body, headers=headers) as reply:
            assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (200, page)
        async with it.client.post("/v1/completions", json=body, headers={"Origin": page}) as reply:
            assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (401, page)

    serving(scene, allowed_origins=frozenset({"https://app.example"}), api_keys=frozenset({"k"}))


def test_without_a_key_only_health_and_readiness_answer() -> None:
    async def scene(it: Served) -> None:
        assert [(await it.get(path))[0] for path in ("/health", "/v1/health", "/ready", "/")] == [200] * 4
        for path in ("/metrics", "/v1/models", "/index.html", "/props"):
            status, text, _ = await it.get(path)
            assert (status, error_of(text)["type"]) == (401, "authentication_error")
        status, text, _ = await it.get("/v1/models", Authorization="Bearer guessed-key")
        assert status == 401
        assert "guessed-key" not in text
        assert (await it.get("/v1/models", Authorization="Bearer k1"))[0] == 200
        assert (await it.get("/v1/models", X_Api_Key="k2"))[0] == 200

    serving(scene, api_keys=frozenset({"k1", "k2"}))


def test_no_key_is_written_anywhere(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    async def scene(it: Served) -> None:
        for headers in ({"Authorization": "Bearer secret-1"}, {"X-Api-Key": "secret-2"}):
            await it.get("/v1/models", **headers)
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        writer.write(b"GET / HTTP/1.1\r\nAuthorization: Bearer secret-3\x00\r\n\r\n")
        await reader.read()
        writer.close()

    with caplog.at_level(logging.DEBUG):
        serving(scene, api_keys=frozenset({"right"}))
    written = "".join(capfd.readouterr()) + caplog.text
    assert "secret" not in written
    assert KEY not in written


def test_an_address_that_others_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "models.example"):
        with pytest.raises(UsageError):
            make_app(FrontConfig(host=host, port=1), Child())
    with pytest.raises(UsageError):
        make_app(FrontConfig(host="127.0.0.1", port=1, allowed_origins=frozenset({"*"})), Child())


def test_dangerous_endpoints_are_closed_unless_opened() -> None:
    asked = ("/props", "/slots/0?action=save", "/lora-adapters", "/models/load", "/tools", "/cors-proxy")

    async def closed(it: Served) -> None:
        for path in asked:
            status, text, _ = await it.ask(path, filename="x", stream=False)
            assert status == 403
            assert "--allow-admin" in str(error_of(text)["message"])
        assert it.child.seen == []

    async def opened(it: Served) -> None:
        assert [(await it.ask(path, stream=False))[0] for path in asked[:2]] == [403, 200]

    serving(closed)
    serving(opened, allowed_endpoints=frozenset({"slots"}))


def test_what_acts_and_is_not_known_is_not_passed_on() -> None:
    async def scene(it: Served) -> None:
        assert (await it.ask("/predict"))[0] == 404
        async with it.client.put("/v1/models") as reply:
            assert (reply.status, "POST" in reply.headers["Allow"]) == (405, True)
        assert it.child.seen == []

    serving(scene)


def test_the_page_is_passed_on_where_it_is_wanted_and_with_no_key_of_ours() -> None:
    async def without(it: Served) -> None:
        status, text, _ = await it.get("/")
        assert (status, f"http://127.0.0.1:{it.port}/v1" in text) == (200, True)
        assert it.child.seen == []

    async def with_page(it: Served) -> None:
        for path in ("/", "/_app/a.js"):
            assert (await it.get(path))[0] == 200
        assert (await it.get("/v1/models"))[0] == 401
        assert [seen.target for seen in it.child.seen] == ["/", "/_app/a.js"]
        assert all("Authorization" not in seen.headers for seen in it.child.seen)

    serving(without)
    serving(with_page, ui=True, api_keys=frozenset({"k"}))


# How much


def test_a_long_body_is_refused_whether_its_length_is_told_or_not() -> None:
    async def scene(it: Served) -> None:
        async def pieces() -> object:
            for _ in range(20):
                yield b"x" * 1000

        for body in (b"x" * 10_001, pieces()):
            async with it.client.post("/v1/completions", data=body) as reply:
                assert reply.status == 413
                error_of(await reply.text())
        assert it.child.seen == []

    serving(scene, max_body_bytes=10_000)


def test_a_body_that_does_not_come_is_not_waited_for_and_holds_no_turn() -> None:
    async def scene(it: Served) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{it.port}\r\nContent-Length: 100\r\n\r\n"
        writer.write(head.encode() + b"some")
        assert (await it.ask(stream=False))[0] == 200  # one at a time, and nobody in the way
        assert b" 408 " in await reader.readline()
        writer.close()

    serving(scene, body_s=0.3)


def test_bodies_held_together_have_a_limit_that_is_given_back() -> None:
    async def scene(it: Served) -> None:
        held = asyncio.create_task(it.ask(stream=False, hold=True, pad="x" * 6000))
        await until(lambda: it.child.running == 1)
        status, text, headers = await it.ask(stream=False, pad="x" * 6000)
        assert (status, int(headers["Retry-After"]) > 0) == (429, True)
        error_of(text)
        it.child.release.set()
        assert (await held)[0] == 200
        assert (await it.ask(stream=False, pad="x" * 6000))[0] == 200

    serving(scene, parallel=2, max_held_bytes=10_000)


def test_beyond_places_and_queue_the_answer_is_429_and_cheap_requests_pass() -> None:
    async def scene(it: Served) -> None:
        inside = [asyncio.create_task(it.ask(stream=False, hold=True)) for _ in range(5)]
        await until(lambda: it.child.running == 2)
        while True:
            _, text, _ = await it.get("/metrics")
            if "foundry_serve_queue_depth 3\n" in text:
                break
        status, text, headers = await it.ask(stream=False)
        assert (status, error_of(text)["type"]) == (429, "rate_limit_error")
        assert int(headers["Retry-After"]) >= 1
        assert (await it.get("/v1/models"))[0] == 200
        it.child.release.set()
        assert [(await task)[0] for task in inside] == [200] * 5
        assert it.child.most_running == 2

    serving(scene, parallel=2, max_queue=3)


def test_a_client_that_leaves_the_queue_is_never_forwarded() -> None:
    async def scene(it: Served) -> None:
        first = asyncio.create_task(it.ask(stream=False, hold=True))
        await until(lambda: it.child.running == 1)
        waiting = asyncio.create_task(it.ask(stream=False))
        while "foundry_serve_queue_depth 1\n" not in (await it.get("/metrics"))[1]:
            pass
        waiting.cancel()
        while "foundry_serve_queue_depth 0\n" not in (await it.get("/metrics"))[1]:
            pass
        it.child.release.set()
        assert (await first)[0] == 200
        assert len([seen for seen in it.child.seen if seen.method == "POST"]) == 1
        assert "foundry_serve_cancelled_total 1\n" in (await it.get("/metrics"))[1]

    serving(scene)


# What goes wrong


@pytest.mark.parametrize("asked", [{"endless": True}, {"hold": True, "n": 2}, {"hold": True, "stream": False}])
def test_the_child_stops_as_soon_as_the_client_leaves(asked: dict[str, Any]) -> None:
    async def scene(it: Served) -> None:
        task = asyncio.create_task(it.ask(**asked))
        await until(lambda: it.child.running == 1)
        task.cancel()
        await until(lambda: it.child.left == 1)
        assert (await it.ask(stream=False))[0] == 200  # its place is free

    serving(scene)


def test_a_client_that_takes_nothing_loses_its_place() -> None:
    async def scene(it: Served) -> None:
        _reader, writer = await asyncio.open_connection("127.0.0.1", it.port, limit=1024)
        body = b'{"endless": true, "times": 2000}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{it.port}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await until(lambda: it.child.left == 1)
        writer.transport.abort()
        assert (await it.ask(stream=False))[0] == 200

    serving(scene, stall_s=0.3)


def test_a_child_that_dies_before_its_reply_is_a_503_and_is_asked_once() -> None:
    async def scene(it: Served) -> None:
        status, text, headers = await it.ask(die="before")
        assert (status, headers["Retry-After"]) == (503, "7")
        assert error_of(text)["type"] == "unavailable_error"
        assert len(it.child.seen) == 1

    serving(scene)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_child_that_dies_in_mid_stream_ends_it_with_an_error_and_without_done(path: str) -> None:
    async def scene(it: Served) -> None:
        status, text, _ = await it.ask(path, die="middle")
        assert status == 200
        assert text.startswith('data: {"text": "0"}\n\n')
        assert "[DONE]" not in text
        last = text.strip().splitlines()[-1]
        assert "llama-server ended" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert ("event: error\n" in text) is (path != "/v1/chat/completions")
        assert "foundry_serve_cut_replies_total 1\n" in (await it.get("/metrics"))[1]

    serving(scene)


@pytest.mark.parametrize("state", ["starting", "restarting", "stopping"])
def test_while_the_child_is_not_ready_the_answer_is_503_at_once(state: str) -> None:
    async def scene(it: Served) -> None:
        it.child.state = state  # type: ignore[assignment]
        for status, text, headers in (await it.ask(), await it.get("/v1/models"), await it.get("/ready")):
            assert (status, headers["Retry-After"]) == (503, "7")
            assert state in text
        assert (await it.get("/health"))[0] == 200
        assert (await it.get("/metrics"))[0] == 200
        assert it.child.seen == []
        it.child.state = "ready"
        assert (await it.get("/ready"))[0] == 200
        assert (await it.ask())[0] == 200

    serving(scene)


def test_a_child_that_is_gone_though_called_ready_is_a_503() -> None:
    async def scene(it: Served) -> None:
        it.child.base_url = "http://127.0.0.1:9"
        status, _, headers = await it.ask()
        assert (status, headers["Retry-After"]) == (503, "7")
        assert (await it.get("/metrics"))[0] == 200

    serving(scene)


def test_a_503_of_the_child_gets_a_time_to_come_back() -> None:
    async def scene(it: Served) -> None:
        status, _, headers = await it.ask(stream=False, status=503)
        assert (status, headers["Retry-After"]) == (503, "7")

    serving(scene)


def test_a_key_that_the_child_does_not_take_is_not_the_clients_fault() -> None:
    async def scene(it: Served) -> None:
        assert (await it.ask(stream=False, status=401))[0] == 503

    serving(scene)


# The end


def test_drain_lets_running_replies_end_and_refuses_the_rest() -> None:
    async def scene(it: Served) -> None:
        running = asyncio.create_task(it.ask(hold=True))
        await until(lambda: it.child.running == 1)
        waiting = asyncio.create_task(it.ask())
        while "foundry_serve_queue_depth 1\n" not in (await it.get("/metrics"))[1]:
            pass
        draining = asyncio.create_task(it.drain())
        for status, text, headers in (await waiting, await it.ask(), await it.get("/v1/models")):
            assert (status, headers["Connection"]) == (503, "close")
            assert int(headers["Retry-After"]) >= 1
            error_of(text)
        assert (await it.get("/ready"))[0] == 503
        assert (await it.get("/health"))[0] == 200
        assert not draining.done()
        it.child.release.set()
        await draining
        status, text, _ = await running
        assert (status, text.endswith("data: [DONE]\n\n")) == (200, True)

    serving(scene, drain_s=20)


def test_drain_cuts_what_does_not_end_and_says_so() -> None:
    async def scene(it: Served) -> None:
        stream = asyncio.create_task(it.ask(hold=True))
        plain = asyncio.create_task(it.ask(stream=False, hold=True))
        await until(lambda: it.child.running == 2)
        await it.drain()
        status, text, _ = await stream
        assert status == 200
        assert "shutting down" in text
        assert "[DONE]" not in text
        assert (await plain)[0] == 503
        await until(lambda: it.child.left == 2)

    serving(scene, parallel=2, drain_s=0.1)


def test_drain_with_nothing_to_do_ends_at_once() -> None:
    async def scene(it: Served) -> None:
        began = time.monotonic()
        await it.drain()
        assert time.monotonic() - began < 10  # of the 1000 s it might wait

    serving(scene, drain_s=1000)


def test_one_who_only_listens_does_not_hold_the_drain_up() -> None:
    async def scene(it: Served) -> None:
        async with it.client.get("/models/sse") as reply:  # its head is there before any event
            assert reply.content_type == "text/event-stream"
            await it.drain()
            assert b"shutting down" in await reply.read()

    serving(scene, drain_s=1000)


# What is counted


def test_requests_are_counted_by_endpoint_and_status_with_the_childs_figures_beside() -> None:
    async def scene(it: Served) -> None:
        it.child.restarts = 3
        await it.ask()
        await it.ask(stream=False)
        await it.ask("/nonsense")
        _, text, headers = await it.get("/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        for line in (
            'foundry_serve_requests_total{endpoint="/v1/completions",status="200"} 2',
            'foundry_serve_requests_total{endpoint="other",status="404"} 1',
            'foundry_serve_rejected_total{reason="unknown"} 1',
            "foundry_serve_completion_tokens_total 10",
            "foundry_serve_upstream_restarts_total 3",
            "foundry_serve_first_byte_seconds_count 2",
            "llamacpp:x 1",
        ):
            assert re.search(f"^{re.escape(line)}$", text, re.M), line

    serving(scene)


def test_many_replies_at_once_do_not_mix() -> None:
    async def scene(it: Served) -> None:
        replies = await asyncio.gather(*(it.ask(n=i) for i in range(30)))
        for i, (status, text, _) in enumerate(replies):
            assert status == 200
            assert text.count("data:") == i + 2

    serving(scene, parallel=4, max_queue=100)


def test_a_client_of_http_1_0_gets_the_stream_to_its_end() -> None:
    async def scene(it: Served) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        head = f"POST /v1/completions HTTP/1.0\r\nHost: localhost:{it.port}\r\nContent-Length: 2\r\n\r\n{{}}"
        writer.write(head.encode())
        reply = await reader.read()
        assert b"chunked" not in reply
        assert reply.endswith(b"data: [DONE]\n\n")
        writer.close()

    serving(scene)


def test_aiohttp_is_what_it_was_written_for() -> None:
    """Heads are bounded in time by the keep-alive timer, which runs from the first byte on since 3.14."""
    assert tuple(map(int, aiohttp.__version__.split(".")[:2])) >= (3, 14)
