"""What the front costs: time to the first token and tokens per second through it, and of llama-server itself.

    .venv/bin/python tests/benchmarks/serve_overhead.py models/demo/demo-Q4_K_M.gguf --rounds 9
    .venv/bin/python tests/benchmarks/serve_overhead.py --generate 100 --rounds 9

Streams of ``--tokens`` tokens of ``/v1/completions``, in turns: one client, then as many as there are places. The
front has a process of its own, as with ``python -m runtime serve``; the client is a plain one that only counts
events, in this process. Then goodput: tokens per second of whole replies under four times as many clients as there
are places, over llama-server's own with as many as it has. Figures are medians; nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.serve.front import FrontConfig, make_app, make_runner
from runtime.serve.upstream import State
from tests.benchmarks.engine_overhead import generated
from tests.benchmarks.loaded import answer, interleaved, medians, ratio, toolchain_folder
from tests.fronted_llama import load

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo" / "demo-Q4_K_M.gguf"
PARALLEL = 4
KEY = secrets.token_hex(16)


@dataclass
class Upstream:
    base_url: str
    api_key: str
    state: State = "ready"
    retry_after_s: int = 1
    restarts: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare llama-server with the front before it.")
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--generate", type=int, metavar="M", help="millions of parameters of a random model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of llama-server")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = generated(Path(folder), asked.generate) if asked.generate else asked.model
        with llama_server(model, asked.threads) as child, front(child) as before:
            return measure(model, child, before, asked)


def measure(model: Path, child: int, before: int, asked: argparse.Namespace) -> int:
    seen: dict[str, list[float]] = {}
    for clients in (1, PARALLEL):
        first: dict[str, list[float]] = {"direct": [], "front": []}

        def run(name: str, port: int, clients: int = clients, first: dict[str, list[float]] = first) -> float:
            first_ms, speed = asyncio.run(streams(port, clients, asked.tokens))
            first[name].append(first_ms)
            return speed

        speeds = interleaved(
            {"direct": lambda run=run: run("direct", child), "front": lambda run=run: run("front", before)},
            asked.rounds,
        )
        seen |= {f"tokens_per_second_{clients}_{name}": values for name, values in speeds.items()}
        seen |= {f"first_token_ms_{clients}_{name}": values[1:] for name, values in first.items()}
    shares = {
        f"speed_{clients}": ratio(seen, f"tokens_per_second_{clients}_front", f"tokens_per_second_{clients}_direct")
        for clients in (1, PARALLEL)
    }
    added_ms = {
        f"added_first_token_ms_{clients}": round(
            statistics.median(seen[f"first_token_ms_{clients}_front"])
            - statistics.median(seen[f"first_token_ms_{clients}_direct"]),
            2,
        )
        for clients in (1, PARALLEL)
    }
    upstream = Upstream(f"http://127.0.0.1:{child}", KEY)

    def loaded(port: int, clients: int) -> float:
        return asyncio.run(load(f"http://127.0.0.1:{port}", upstream, clients, replies=4 * PARALLEL)).tokens_per_s

    goods = interleaved(
        {"direct": lambda: loaded(child, PARALLEL), "front": lambda: loaded(before, 4 * PARALLEL)}, asked.rounds
    )
    shares["goodput_4x"] = ratio(goods, "front", "direct")
    return answer({"model": model.name, "tokens": asked.tokens, **medians(seen), **shares, **added_ms})


async def streams(port: int, clients: int, tokens: int) -> tuple[float, float]:
    """The median time to a first event in milliseconds, and the tokens per second of all clients together."""
    began = time.perf_counter()
    first_s = await asyncio.gather(*(stream(port, tokens) for _ in range(clients)))
    return 1e3 * statistics.median(first_s), clients * tokens / (time.perf_counter() - began)


async def stream(port: int, tokens: int) -> float:
    """Seconds from the request to the first event of a stream that is read to its end."""
    body = json.dumps(
        {"prompt": "The class", "stream": True, "max_tokens": tokens, "ignore_eos": True, "cache_prompt": False}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    seen = b""
    while b"data: " not in seen:
        seen += await reader.readuntil(b"\n")
    first_s = time.perf_counter() - began
    rest = seen
    while piece := await reader.read(1 << 16):
        rest = (rest + piece)[-100:]
    assert b"[DONE]" in rest, "the stream did not come to its end"
    writer.close()
    return first_s


@contextmanager
def llama_server(model: Path, threads: int) -> Iterator[int]:
    """The port of one with the model."""
    port = free_port()
    program = toolchain_folder() / "bin" / "llama-server"
    sized = ["--parallel", str(PARALLEL), "--ctx-size", str(PARALLEL * 512), "--threads", str(threads)]
    argv = [program, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--metrics", *sized]
    env = {**os.environ, "LLAMA_API_KEY": KEY}
    process = subprocess.Popen(
        list(map(str, argv)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        wait_for(port)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def front(child: int) -> Iterator[int]:
    """The port of a front before ``child``, in a process of its own."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(child, port, KEY), daemon=True)
    process.start()
    try:
        wait_for(port)
        yield port
    finally:
        process.kill()
        process.join()


def serve(child: int, port: int, key: str) -> None:
    from aiohttp import web

    async def forever() -> None:
        config = FrontConfig(
            host="127.0.0.1", port=port, parallel=PARALLEL, max_queue=PARALLEL, api_keys=frozenset({key})
        )
        runner = make_runner(make_app(config, Upstream(f"http://127.0.0.1:{child}", key)))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()

    asyncio.run(forever())


def wait_for(port: int) -> None:
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers on port {port}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
