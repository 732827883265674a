"""The front before a real llama-server: the openai client, clients that leave, overload, a crash, the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from runtime.serve.front import drain
from tests.e2e.test_runtime_cli import with_context_length
from tests.fronted_llama import (
    LONG,
    LONG_TOKENS,
    PARALLEL,
    SHORT,
    Child,
    fronted,
    gauge,
    llama_server,
    load,
    quiet,
)
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


def client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0, **options})


def test_the_openai_client_works_as_with_openai(child: Child) -> None:
    async def scene() -> None:
        async with fronted(child, api_keys=frozenset({"sesame"})) as (url, _):
            with pytest.raises(openai.AuthenticationError, match="no such API key"):
                await client(url).models.list()
            ours = client(url, api_key="sesame")
            assert [model.id async for model in await ours.models.list()] == ["demo"]
            asked: Any = {
                "model": "demo",
                "messages": [{"role": "user", "content": "What is a class?"}],
                "max_tokens": 12,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 2,
            }
            whole = await ours.chat.completions.create(**asked)
            assert whole.usage is not None
            assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content or [])
            pieces = [piece async for piece in await ours.chat.completions.create(**asked, stream=True)]
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
            assert text == whole.choices[0].message.content
            schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
            told: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
            found = await ours.chat.completions.create(**{**asked, "max_tokens": 40}, response_format=told)
            assert json.loads(found.choices[0].message.content or "")["n"] is not None
            with pytest.raises(openai.PermissionDeniedError, match="--allow-admin"):
                await ours.post("/../props", cast_to=object, body={})
            with pytest.raises(openai.BadRequestError):
                await ours.chat.completions.create(**{**asked, "messages": [{"role": "user"}]})

    asyncio.run(scene())


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


def test_fifty_clients_that_leave_cost_next_to_nothing(child: Child) -> None:
    """What llama-server still computes for all of them after they left, as a share of one whole reply."""

    async def scene() -> tuple[float, float]:
        async with fronted(child) as (url, _), aiohttp.ClientSession(url) as session:
            before = child.cpu_s()
            async with session.post("/v1/completions", json=LONG) as reply:
                assert (await reply.read()).endswith(b"data: [DONE]\n\n")
            full_s = child.cpu_s() - before
            after_s, left = 0.0, 0
            while left < 50:
                streams = [await session.post("/v1/completions", json=LONG) for _ in range(min(PARALLEL, 50 - left))]
                for stream in streams:
                    await stream.content.readany()
                before = child.cpu_s()
                for stream in streams:
                    stream.close()
                left += len(streams)
                await quiet(session)
                after_s += child.cpu_s() - before
            return full_s, after_s

    full_s, after_s = asyncio.run(scene())
    print(f"a full generation {full_s:.2f} s of CPU, 50 abandoned ones {after_s:.2f} s together")
    assert after_s <= 0.05 * full_s


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


def test_four_times_the_load_keeps_the_child_as_busy_as_it_can_be_and_429_answers_the_rest(child: Child) -> None:
    """Goodput without a clock: the front keeps as many places in use as clients of the child itself do, and what is
    generated is of use. (Tokens per second, which other work on the machine disturbs, are printed.)"""

    async def scene() -> None:
        async with fronted(child, max_queue=PARALLEL) as (url, _):
            own = await load(child.base_url, child, PARALLEL, replies=40)
            good = await load(url, child, 4 * PARALLEL, replies=40)
        print(f"\ndirect {own}\n4 x    {good}\ngoodput over capacity: {good.tokens_per_s / own.tokens_per_s:.2f}")
        assert own.statuses == {200}
        assert {200, 429} <= good.statuses <= {200, 429, 503}
        assert good.per_decode >= 0.9 * own.per_decode
        assert good.good_tokens >= 0.99 * good.all_tokens

    asyncio.run(scene())


def test_a_crash_in_the_middle_is_an_error_of_the_client_and_the_next_request_is_served(
    toolchain: Toolchain, tireless: Path, tmp_path: Path
) -> None:
    async def scene(first: Child, second: Child) -> None:
        async with fronted(first) as (url, _):
            asked: Any = {"model": "demo", "prompt": LONG["prompt"], "max_tokens": LONG_TOKENS}
            stream = await client(url).completions.create(**asked, stream=True, extra_body={"ignore_eos": True})

            async def read_and_kill() -> None:
                async for _ in stream:
                    if first.process.is_running():
                        first.process.kill()
                        first.process.wait()

            with pytest.raises(openai.APIError, match="llama-server ended"):
                await read_and_kill()
            with pytest.raises(openai.InternalServerError):  # 503: not ready, though nobody has noticed yet
                await client(url).completions.create(**asked)
            first.state = "restarting"
            waiting = asyncio.create_task(client(url, max_retries=5).completions.create(**{**asked, "max_tokens": 4}))
            await asyncio.sleep(0.5)
            first.base_url, first.api_key, first.state = second.base_url, second.api_key, "ready"
            assert (await waiting).choices[0].text

    with (
        llama_server(toolchain.bin_dir, tireless, tmp_path / "first") as first,
        llama_server(toolchain.bin_dir, tireless, tmp_path / "second") as second,
    ):
        asyncio.run(scene(first, second))


def test_drain_ends_a_stream_in_time_with_an_error_that_the_client_understands(child: Child) -> None:
    async def scene() -> None:
        async with fronted(child, drain_s=0.3) as (url, app), aiohttp.ClientSession(child.base_url) as session:
            asked: Any = {"model": "demo", "prompt": LONG["prompt"], "max_tokens": 8000}
            stream = await client(url).completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
            ending: asyncio.Task[None] | None = None

            async def read_and_drain() -> None:
                nonlocal ending
                async for _ in stream:
                    ending = ending or asyncio.create_task(drain(app))

            with pytest.raises(openai.APIError, match="shutting down"):
                await read_and_drain()
            assert ending is not None
            await ending
            await quiet(session, child.api_key)

    asyncio.run(scene())
