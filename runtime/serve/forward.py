"""One request to llama-server and its reply back, byte for byte, as it comes (but for what ``private`` keeps back).

A connection to the child serves one request: when a client leaves, the connection is closed and llama-server stops
generating, and no request meets a kept connection that the child just gave up. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import io
import time
from dataclasses import dataclass, field

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from runtime.serve import replies
from runtime.serve.endpoints import Endpoint
from runtime.serve.metrics import TAIL_BYTES, Metrics
from runtime.serve.private import PRIVATE, public
from runtime.serve.upstream import Upstream

CONNECT_S = 5.0
STALL_S = 60.0  # a client that takes nothing for so long has left, and must not keep its place

# Hop by hop (RFC 9110, 7.6.1), or ours to set, or not to be trusted. With x-conversation-id llama-server goes on
# generating when the client has left (tools/server/server-stream.h), past every limit here.
_NOT_FORWARDED = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "expect",
        "authorization",
        "x-api-key",
        "forwarded",
        "x-real-ip",
        "origin",
        "referer",
        "cookie",
        "x-conversation-id",
    ]
)
_NOT_RETURNED = frozenset(
    ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "trailer", "upgrade", "server", "date"]
)
_PREFIXES = ("x-forwarded-", "access-control-")


@dataclass(eq=False)
class Running:
    """A reply on its way. ``cut`` is set before its task is cancelled because the server ends."""

    task: asyncio.Task[object]
    generates: bool
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What goes to the child: a request that was found good, its body whole.

    The body is read before a turn is waited for: a client that sends slowly holds no place of the model's, and the
    child sees a length of our making instead of a framing of the client's. ``with_key``: as one who may.
    """

    endpoint: Endpoint
    target: str
    body: bytes
    with_key: bool
    arrived_s: float


@dataclass
class Forwarder:
    session: aiohttp.ClientSession
    upstream: Upstream
    metrics: Metrics
    stall_s: float = STALL_S
    running: set[Running] = field(default_factory=set)

    async def forward(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        """The child's reply, already sent, or an error of ours. Raises ConnectionError when the client is gone."""
        if self.upstream.state != "ready":
            return self.unavailable()
        task = asyncio.current_task()
        assert task is not None
        mine = Running(task, asked.endpoint.kind == "generates")
        self.running.add(mine)
        exchange = _Exchange(self, request, asked)
        try:
            return await exchange.run()
        except asyncio.CancelledError:
            if not mine.cut:
                raise
            task.uncancel()
            return await exchange.end_short("the server is shutting down")
        finally:
            self.running.discard(mine)

    def unavailable(self) -> web.Response:
        """Told at once, not held back until the child is there: a client that knows can go elsewhere, the openai
        client tries again by itself, and a child that does not come back keeps nobody waiting."""
        state = self.upstream.state
        said = "llama-server does not answer" if state == "ready" else f"llama-server is {state}"
        return replies.error(503, f"{said}; try again", retry_after_s=max(1, self.upstream.retry_after_s))

    async def finish(self, within_s: float) -> None:
        """Let generating replies end, and after ``within_s`` cut those that are left, and those that only tell what
        goes on, for as long as somebody listens."""
        if generating := [each.task for each in self.running if each.generates]:
            await asyncio.wait(generating, timeout=within_s)
        left = list(self.running)
        for each in left:
            each.cut = True
            each.task.cancel()
        if left:
            await asyncio.wait([each.task for each in left], timeout=_LAST_WORDS_S)


def new_session() -> aiohttp.ClientSession:
    """Without limits on connections and time: admission and the clients' patience are the limits."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE),
        trust_env=False,
    )


_LAST_WORDS_S = 1.0
_BROKEN = "llama-server ended in the middle of this reply"


class _Exchange:
    """One request to the child and what has become of its reply."""

    def __init__(self, forwarder: Forwarder, request: web.Request, asked: Asked) -> None:
        self._of = forwarder
        self._request = request
        self._asked = asked
        self._response: web.StreamResponse | None = None  # once a byte of it was sent

    async def run(self) -> web.StreamResponse:
        upstream, asked = self._of.upstream, self._asked
        private = asked.endpoint.label in PRIVATE and self._request.method == hdrs.METH_GET
        try:
            reply = await self._of.session.request(
                self._request.method,
                URL(upstream.base_url + asked.target, encoded=True),
                headers=_to_child(self._request.headers, upstream.api_key if asked.with_key else "", plain=private),
                data=io.BytesIO(asked.body) if self._request.method == hdrs.METH_POST else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError, TimeoutError):
            return self._of.unavailable()
        try:
            if reply.status == 401 and asked.with_key:  # our key to it, not the client's to us
                return self._of.unavailable()
            if private and reply.status == 200:
                return await self._pass_on_public(reply)
            return await self._pass_on(reply)
        finally:
            reply.close()

    async def end_short(self, why: str) -> web.StreamResponse:
        """The end of a reply that cannot be whole: an error as long as nothing was sent; then an event in a stream of
        events; elsewhere the connection breaks, which is what a cut body looks like in HTTP."""
        self._of.metrics.cut += 1
        if self._response is None:
            return replies.closing(replies.error(503, why, retry_after_s=max(1, self._of.upstream.retry_after_s)))
        if self._response.content_type == "text/event-stream":
            await self._write(replies.event(self._asked.endpoint.label, 503, why))
            self._response.force_close()
            await self._response.write_eof()
        elif self._request.transport is not None:
            self._request.transport.abort()
        return self._response

    async def _pass_on_public(self, reply: aiohttp.ClientResponse) -> web.StreamResponse:
        try:
            body = public(await reply.read())
        except (aiohttp.ClientError, OSError):
            return await self.end_short(_BROKEN)
        headers = _to_client(reply.headers)
        headers.popall(hdrs.CONTENT_LENGTH, None)
        return web.Response(body=body, headers=headers)

    async def _pass_on(self, reply: aiohttp.ClientResponse) -> web.StreamResponse:
        tail = b""
        if reply.content_type == "text/event-stream" and self._asked.endpoint.kind != "generates":
            await self._begin(reply)  # its first event may be long in coming
        while True:
            try:
                chunk = await reply.content.readany()
            except (aiohttp.ClientError, OSError):
                return await self.end_short(_BROKEN)
            if not chunk:
                break
            if self._response is None:
                if self._asked.endpoint.kind == "generates":
                    self._of.metrics.first_byte_s.observe(time.monotonic() - self._asked.arrived_s)
                await self._begin(reply)
            await self._write(chunk)
            tail = (tail + chunk)[-TAIL_BYTES:]
        response = self._response or await self._begin(reply)
        await response.write_eof()
        if self._asked.endpoint.kind == "generates" and reply.status == 200:
            self._of.metrics.count_tokens(tail)
        return response

    async def _begin(self, reply: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = _to_client(reply.headers)
        if reply.status == 503:
            headers.setdefault(hdrs.RETRY_AFTER, str(max(1, self._of.upstream.retry_after_s)))
        self._response = web.StreamResponse(status=reply.status, reason=reply.reason, headers=headers)
        await self._response.prepare(self._request)
        return self._response

    async def _write(self, chunk: bytes) -> None:
        assert self._response is not None
        try:
            async with asyncio.timeout(self._of.stall_s):
                await self._response.write(chunk)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client takes nothing any more") from None


def _to_child(headers: CIMultiDictProxy[str], key: str, *, plain: bool) -> CIMultiDict[str]:
    """``plain``: a reply that we are to read is not to be compressed."""
    passed = _without(headers, _NOT_FORWARDED | ({"accept-encoding"} if plain else set()))
    if key:
        passed[hdrs.AUTHORIZATION] = f"Bearer {key}"
    return passed


def _to_client(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    return _without(headers, _NOT_RETURNED)


def _without(headers: CIMultiDictProxy[str], names: frozenset[str]) -> CIMultiDict[str]:
    """All but ``names``, those that Connection names, what proxies say of themselves, and what is not ASCII."""
    hop = {each.strip().lower() for line in headers.getall(hdrs.CONNECTION, ()) for each in line.split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in names | hop and not name.lower().startswith(_PREFIXES) and value.isascii()
    )
