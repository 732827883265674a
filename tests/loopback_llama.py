"""The front before a small real server on 127.0.0.1 that stands where llama-server would, and faults on request.

``/v1/completions`` and its kin obey their body: ``{"n": 3}`` streams three events, ``{"hold": true}`` none until
``Child.release`` is set, ``{"die": "before" | "middle"}`` closes the connection, ``{"stream": false}`` answers at once.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from runtime.serve.front import FrontConfig, drain, make_app, make_runner
from runtime.serve.upstream import State

BOUND_S = 30.0  # against hanging
KEY = "key-between-front-and-child"


@dataclass
class Seen:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Child:
    """The upstream and what it saw."""

    base_url: str = ""
    state: State = "ready"
    retry_after_s: int = 7
    restarts: int = 0
    api_key: str = KEY
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    left: int = 0  # replies whose reader went away
    release: asyncio.Event = field(default_factory=asyncio.Event)
    metrics: str = "# HELP llamacpp:x y\n# TYPE llamacpp:x gauge\nllamacpp:x 1\n"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request.method, request.raw_path, dict(request.headers), body))
        if request.path == "/metrics":
            return web.Response(text=self.metrics)
        if request.method == "DELETE":
            return web.Response(status=204)
        if request.path == "/models/sse":
            return await self._tell(request)
        if request.method in ("GET", "HEAD"):
            return web.json_response({"path": request.path}, headers={"Access-Control-Allow-Origin": "*"})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._generate(request, json.loads(body or b"{}"))
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise
        finally:
            self.running -= 1

    async def _tell(self, request: web.Request) -> web.StreamResponse:
        """Events without an end, of which none comes."""
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await asyncio.Event().wait()
        return reply

    async def _generate(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        die = asked.get("die")
        assert request.transport is not None
        if die == "before":
            request.transport.abort()
            return web.Response()
        if not asked.get("stream", True):
            if asked.get("hold"):
                await self.release.wait()
            answer = {"text": "x", "usage": {"completion_tokens": 5, "prompt_tokens": 2}}
            return web.json_response(answer, status=asked.get("status", 200))
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for i in range(asked.get("n", 2)):
            await reply.write(f'data: {{"text": "{i}"}}\n\n'.encode())
            if die == "middle":
                request.transport.abort()
                return reply
            if asked.get("hold"):
                await self.release.wait()
        if asked.get("endless"):
            while True:
                await reply.write(b'data: {"text": "and on"}\n\n' * asked.get("times", 1))
                await asyncio.sleep(0)
        await reply.write(b'data: {"timings": {"predicted_n": 5}}\n\ndata: [DONE]\n\n')
        await reply.write_eof()
        return reply


@dataclass
class Served:
    port: int
    child: Child
    client: aiohttp.ClientSession
    app: web.Application

    async def ask(self, path: str = "/v1/completions", **asked: Any) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers of a POST."""
        async with self.client.post(path, json=asked) as reply:
            return reply.status, await reply.text(), dict(reply.headers)

    async def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.get(URL(f"http://127.0.0.1:{self.port}{path}", encoded=True), headers=named) as reply:
            return reply.status, await reply.text(), dict(reply.headers)

    async def drain(self) -> None:
        await drain(self.app)


def serving(scene: Callable[[Served], Awaitable[None]], *, child: Child | None = None, **config: Any) -> None:
    """Play ``scene`` with a front of this configuration before a child."""

    async def play() -> None:
        async with asyncio.timeout(BOUND_S), served(child or Child(), **config) as it:
            await scene(it)

    asyncio.run(play())


@asynccontextmanager
async def served(child: Child, **changes: Any) -> AsyncIterator[Served]:
    inner = web.Application(client_max_size=1 << 30)
    inner.router.add_route("*", "/{path:.*}", child.answer)
    below = web.AppRunner(inner, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await below.setup()
    port = await _listen(below)
    child.base_url = f"http://127.0.0.1:{port}"
    port = free_port()
    app = make_app(FrontConfig(**{"host": "127.0.0.1", "port": port, "drain_s": 0.2, **changes}), child)
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            yield Served(port, child, client, app)
    finally:
        child.release.set()
        await runner.cleanup()
        await below.cleanup()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come."""
    while not holds():
        await asyncio.sleep(0.005)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def _listen(runner: web.AppRunner) -> int:
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return int(runner.addresses[0][1])
