"""A real llama-server with the front before it in this process, and clients that load it."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web

from runtime.serve.front import FrontConfig, make_app, make_runner
from runtime.serve.upstream import State, Upstream
from tests.loopback_llama import free_port

PARALLEL = 4
PATIENCE_S = 120
LONG_TOKENS = 3000
LONG: dict[str, Any] = {
    "prompt": "The class statement",
    "stream": True,
    "max_tokens": LONG_TOKENS,
    "ignore_eos": True,
    "temperature": 0,
}
SHORT: dict[str, Any] = {"prompt": "The class statement", "max_tokens": 256, "ignore_eos": True, "temperature": 0}


@dataclass
class Child:
    """A llama-server of its own."""

    base_url: str
    api_key: str
    process: psutil.Popen
    state: State = "ready"
    retry_after_s: int = 1
    restarts: int = 0

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def llama_server(bin_dir: Path, model: Path, log: Path) -> Iterator[Child]:
    port, key = free_port(), secrets.token_hex(16)
    program = bin_dir / "llama-server"
    # Four sequences of 8,192 tokens; sleeping threads, since a spinning one would count as work after the end.
    sized = ["--parallel", str(PARALLEL), "--ctx-size", str(PARALLEL * 8192), "--threads", "1", "--alias", "demo"]
    argv = [program, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--metrics", *sized]
    env = {**os.environ, "LLAMA_API_KEY": key, "GOMP_SPINCOUNT": "100"}
    with log.open("wb") as written:
        process = psutil.Popen(list(map(str, argv)), stdout=written, stderr=subprocess.STDOUT, env=env)
    try:
        child = Child(f"http://127.0.0.1:{port}", key, process)
        wait_until_ready(child, log)
        yield child
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()


def wait_until_ready(child: Child, log: Path) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s and child.process.is_running():
        try:
            with urllib.request.urlopen(f"{child.base_url}/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.05)
    raise AssertionError(log.read_text())


@asynccontextmanager
async def fronted(child: Child, **changes: Any) -> AsyncIterator[tuple[str, web.Application]]:
    """The front's address and application."""
    port = free_port()
    app = make_app(FrontConfig(**{"host": "127.0.0.1", "port": port, "parallel": PARALLEL, **changes}), child)
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield f"http://127.0.0.1:{port}", app
    finally:
        await runner.cleanup()


@dataclass(frozen=True)
class Load:
    """What came of it: tokens of whole replies, of all, and for each decode (as many as places are in use)."""

    good_tokens: int
    all_tokens: float
    per_decode: float
    tokens_per_s: float
    statuses: frozenset[int]


async def load(url: str, child: Upstream, clients: int, *, replies: int) -> Load:
    """So many clients, each asking again and again, and coming back when it is told to, until there are enough."""
    done, statuses = 0, set[int]()
    key = {"Authorization": f"Bearer {child.api_key}"}

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal done
        while done < replies:
            async with session.post("/v1/completions", json=SHORT) as reply:
                statuses.add(reply.status)
                if reply.status == 200:
                    done += (await reply.json())["usage"]["completion_tokens"] == SHORT["max_tokens"]
            if reply.status != 200:
                await asyncio.sleep(float(reply.headers["Retry-After"]))

    names = ("llamacpp:tokens_predicted_total", "llamacpp:n_decode_total")
    async with aiohttp.ClientSession(child.base_url) as own, aiohttp.ClientSession(url, headers=key) as session:
        before = [await gauge(own, name, child.api_key) for name in names]
        began = time.monotonic()
        asking = [asyncio.create_task(one(session)) for _ in range(clients)]
        while done < replies:
            await asyncio.sleep(0.01)
        took_s = time.monotonic() - began
        in_time = done
        await asyncio.gather(*asking)
        after = [await gauge(own, name, child.api_key) for name in names]
    tokens, decodes = (end - start for start, end in zip(before, after, strict=True))
    good = done * SHORT["max_tokens"]
    return Load(good, tokens, tokens / decodes, in_time * SHORT["max_tokens"] / took_s, frozenset(statuses))


async def quiet(session: aiohttp.ClientSession, key: str = "") -> None:
    """Wait until llama-server computes nothing."""
    while await gauge(session, "llamacpp:requests_processing", key) != 0:
        await asyncio.sleep(0.02)


async def gauge(session: aiohttp.ClientSession, name: str, key: str = "") -> float:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with session.get("/metrics", headers=headers) as reply:
        found = re.search(rf"^{name} (\S+)$", await reply.text(), re.M)
        return float(found[1]) if found else float("nan")
