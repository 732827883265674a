"""The front before a real llama-server whose own figures are looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.test_runtime_cli import with_context_length
from tests.fronted_llama import LONG, LONG_TOKENS, SHORT, Child, fronted, gauge, llama_server
from toolchain.build.toolchain import Toolchain


@pytest.fixture(scope="module")
def tireless(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as one of long contexts."""
    path = tmp_path_factory.mktemp("serve") / "demo.gguf"
    path.write_bytes(with_context_length(demo_gguf, 32_768))
    return path


@pytest.fixture(scope="module")
def child(toolchain: Toolchain, tireless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    with llama_server(toolchain.bin_dir, tireless, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def test_metrics_of_both_are_one_valid_text(child: Child) -> None:
    from tests.unit.test_serve_metrics import parsed

    async def scene() -> None:
        async with fronted(child) as (url, _), aiohttp.ClientSession(url) as session:
            async with session.post("/v1/completions", json=SHORT) as reply:
                told = (await reply.json())["usage"]
            async with session.post("/v1/completions", json={**SHORT, "stream": True}) as reply:
                assert (await reply.read()).endswith(b"data: [DONE]\n\n")
            async with session.get("/metrics") as reply:
                found = parsed(await reply.text())
        assert told["completion_tokens"] == 256
        assert found["foundry_serve_completion_tokens_total"] == 512
        assert found["foundry_serve_prompt_tokens_total"] == 2 * told["prompt_tokens"]
        assert found["llamacpp:tokens_predicted_total"] > 0

    asyncio.run(scene())


def test_a_client_that_leaves_before_its_reply_ends_the_work_and_frees_its_place(child: Child) -> None:
    """llama-server looks once a second after a client that gets nothing yet, and only while no other is served
    (each result of another starts that second anew): so one client, and nobody asks meanwhile."""

    async def scene() -> None:
        async with fronted(child, parallel=1) as (url, _), aiohttp.ClientSession(url) as session:
            before = await gauge(session, "llamacpp:tokens_predicted_total")
            began_s = child.cpu_s()
            task = asyncio.create_task(session.post("/v1/completions", json={**LONG, "stream": False}))
            while child.cpu_s() < began_s + 0.2:
                await asyncio.sleep(0.02)
            task.cancel()
            before_s = -1.0
            while child.cpu_s() != before_s:  # until it works no more
                before_s = child.cpu_s()
                await asyncio.sleep(0.5)
            async with session.post("/v1/completions", json=SHORT) as reply:
                assert reply.status == 200
                assert (await reply.json())["usage"]["completion_tokens"] == SHORT["max_tokens"]
            assert await gauge(session, "llamacpp:tokens_predicted_total") - before < LONG_TOKENS

    asyncio.run(scene())
