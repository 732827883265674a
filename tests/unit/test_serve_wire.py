"""Hostile bytes on the wire: what no client library would send."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.loopback_llama import Served, serving, until

BODY = b'{"stream": false}'


async def talk(it: Served, sent: bytes, *, bound_s: float = 10) -> bytes:
    """Everything that comes back until the server closes. ``HOST`` stands for a good Host line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
    writer.write(sent.replace(b"HOST", f"Host: localhost:{it.port}".encode()))
    reply = b""
    try:
        async with asyncio.timeout(bound_s):
            while chunk := await reader.read(1 << 16):
                reply += chunk
            return reply
    except ConnectionResetError:  # it closed before it had read all of ours
        return reply
    finally:
        writer.transport.abort()


def statuses(reply: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/\d\.\d (\d{3}) ", reply)]


def post(*headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((b"POST /v1/completions HTTP/1.1", b"HOST", *headers, b"", body))


SMUGGLED = b"POST /props HTTP/1.1\r\nHOST\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    "sent",
    [
        post(b"Content-Length: 6", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
        post(b"Transfer-Encoding: chunked", b"Content-Length: 6", body=b"0\r\n\r\n" + SMUGGLED),
        post(b"Content-Length: 2", b"Content-Length: 40", body=b"{}" + SMUGGLED),
        post(b"Content-Length: 2, 40", body=b"{}" + SMUGGLED),
        post(b"Content-Length: +2", body=b"{}" + SMUGGLED),
        post(b"Content-Length: -1", body=b"{}"),
        post(b"Content-Length: 0x2", body=b"{}"),
        post(b"Content-Length : 2", body=b"{}" + SMUGGLED),
        post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n" + SMUGGLED),
        post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + SMUGGLED),
        post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=b"0\r\n\r\n" + SMUGGLED),
        post(b"Transfer-Encoding:\x0bchunked", body=b"0\r\n\r\n" + SMUGGLED),
        post(b"Transfer-Encoding: chunked", body=b"-1\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"2;\n{}\r\n0\r\n\r\n"),
        post(b"X: a\x00b", b"Content-Length: 2", body=b"{}"),
        post(b"X y: 1", b"Content-Length: 2", body=b"{}"),
        post(b" folded: 1", b"Content-Length: 2", body=b"{}"),
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHOST\r\nHOST\r\n\r\n",
        b"GET / HTTP/1.1\r\nHOST\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/3.7\r\nHOST\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHOST\r\n\r\n",
        b"GET http://127.0.0.1:1/props HTTP/1.1\r\nHOST\r\n\r\n",
        b"GET //evil.example/ HTTP/1.1\r\nHOST\r\nConnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHOST\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHOST\r\n\r\n" + SMUGGLED,
        b"CONNECT / HTTP/1.1\r\nHOST\r\n\r\n" + SMUGGLED,
        b"TRACE / HTTP/1.1\r\nHOST\r\n\r\n",
        b"GET /%70rops HTTP/1.1\r\nHOST\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHOST\r\n\r\n",
        b"GET /?\xff HTTP/1.1\r\nHOST\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_of_it_passes(sent: bytes) -> None:
    async def scene(it: Served) -> None:
        reply = await talk(it, sent)
        codes = statuses(reply)
        assert all(code in (400, 403, 404, 405) for code in codes)
        assert len(codes) == 1 or reply == b""
        assert [seen for seen in it.child.seen if seen.method == "POST"] == []

    serving(scene, head_s=0.5)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHOST\r\n\r\n",
        b"GET / HTTP/1.1\r\nHOST\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHOST\r\n" + b"X" * 20_000 + b": 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHOST\r\n" + b"X: 1\r\n" * 5_000 + b"\r\n",
    ],
)
def test_a_huge_head_is_refused(head: bytes) -> None:
    async def scene(it: Served) -> None:
        assert statuses(await talk(it, head)) == [400]

    serving(scene)


def test_a_head_without_an_end_is_cut() -> None:
    async def scene(it: Served) -> None:
        assert statuses(await talk(it, b"GET / HTTP/1.1\r\nHOST\r\nX: " + b"a" * 1_000_000)) in ([], [400])

    serving(scene)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHOST\r\nX: "])
def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes) -> None:
    async def scene(it: Served) -> None:
        assert await talk(it, sent) == b""

    serving(scene, head_s=0.3)


def test_a_head_that_drips_is_not_waited_for_either() -> None:
    async def scene(it: Served) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        reading = asyncio.create_task(reader.read())
        writer.write(b"GET / HTTP/1.1\r\n")
        while not reading.done():
            writer.write(b"X: 1\r\n")
            await asyncio.sleep(0.05)
        writer.transport.abort()

    serving(scene, head_s=0.3)


def test_a_websocket_is_refused_and_an_offer_of_http_2_is_not_taken() -> None:
    async def scene(it: Served) -> None:
        upgrade = b"GET /v1/models HTTP/1.1\r\nHOST\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n"
        websocket = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        reply = await talk(it, (upgrade % b"websocket").removesuffix(b"\r\n") + websocket)
        assert statuses(reply) == [400]
        assert it.child.seen == []
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        writer.write((upgrade % b"h2c").replace(b"HOST", f"Host: localhost:{it.port}".encode()))
        assert b" 200 " in await reader.readline()
        writer.close()
        assert "Upgrade" not in it.child.seen[0].headers

    serving(scene)


def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    async def scene(it: Served) -> None:
        one = post(b"Content-Length: 17", body=BODY)
        last = b"GET /health HTTP/1.1\r\nHOST\r\nConnection: close\r\n\r\n"
        reply = await talk(it, one * 3 + last)
        assert statuses(reply) == [200] * 4
        assert it.child.most_running == 1
        assert reply.endswith(b'{"status": "ok"}')

    serving(scene, parallel=4)


def test_a_thousand_pipelined_requests_do_not_outlive_their_client() -> None:
    async def scene(it: Served) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", it.port)
        held = b'{"stream": false, "hold": true}'
        one = post(b"Content-Length: %d" % len(held), body=held)
        writer.write((one * 1000).replace(b"HOST", f"Host: localhost:{it.port}".encode()))
        await until(lambda: it.child.running == 1)
        writer.transport.abort()
        await asyncio.sleep(0.2)
        it.child.release.set()
        await until(lambda: it.child.running == 0)
        assert (await it.ask(stream=False))[0] == 200
        assert len(it.child.seen) <= 3

    serving(scene, parallel=4)


def test_a_body_after_a_refusal_is_not_read_as_a_request() -> None:
    async def scene(it: Served) -> None:
        smuggled = post(b"Content-Length: 17", body=BODY).replace(b"HOST", b"Host: localhost:%d" % it.port)
        refused = b"POST /props HTTP/1.1\r\nHOST\r\nContent-Length: %d\r\n\r\n" % len(smuggled)
        assert statuses(await talk(it, refused + smuggled)) == [403]
        assert it.child.seen == []

    serving(scene)


def test_a_compressed_body_is_refused_rather_than_unpacked() -> None:
    async def scene(it: Served) -> None:
        reply = await talk(it, post(b"Content-Encoding: gzip", b"Content-Length: 17", body=BODY))
        assert statuses(reply) == [415]

    serving(scene)


def test_a_body_that_breaks_off_later_is_the_clients_fault() -> None:
    async def scene(it: Served) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        head = post(b"Transfer-Encoding: chunked").replace(b"HOST", f"Host: localhost:{it.port}".encode())
        writer.write(head + b"2\r\n{}\r\n")
        await asyncio.sleep(0.1)
        writer.write(b"no length\r\n")
        assert statuses(await reader.read())[0] in (400, 408)
        writer.close()
        assert it.child.seen == []

    serving(scene, body_s=0.5)


def test_bytes_beyond_ascii_in_a_header_do_no_harm() -> None:
    async def scene(it: Served) -> None:
        odd = (b"X: \xff\xfe", b"Y: caf\xc3\xa9", b"Z: z", b"Authorization: Bearer \xff", b"Connection: close")
        assert statuses(await talk(it, post(*odd, b"Content-Length: 17", body=BODY))) == [200]
        got = it.child.seen[0].headers
        assert got["Z"] == "z"
        assert not {"X", "Y"} & set(got)

    serving(scene)


def test_replies_without_a_body_keep_the_connection_in_step() -> None:
    async def scene(it: Served) -> None:
        head = b"HEAD /v1/models HTTP/1.1\r\nHOST\r\n\r\n"
        gone = b"DELETE /v1/stream?conv_id=a HTTP/1.1\r\nHOST\r\n\r\n"
        last = b"GET /health HTTP/1.1\r\nHOST\r\nConnection: close\r\n\r\n"
        reply = await talk(it, head + gone + head + last)
        assert statuses(reply) == [200, 204, 200, 200]
        assert reply.count(b"\r\n\r\nHTTP/1.1") == 3

    serving(scene)
