"""``serve`` when things fall, hang, stop or die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from runtime.serve.command import child_environment
from runtime.serve.supervisor import Launch, Patience, Supervisor
from tests import serving as fixtures
from tests.serving import ENDLESS, HELLO, PATIENCE_S, refused, serving, until
from toolchain.base.errors import CommandError

environment, tireless = fixtures.environment, fixtures.tireless


def test_killed_child_cuts_the_stream_and_the_next_request_is_served(
    environment: dict[str, str], tireless: Path
) -> None:
    with serving(environment, tireless, "--n-ctx", 16384, "--parallel", 1) as running:
        client = running.client(timeout=PATIENCE_S)
        stream = client.chat.completions.create(
            model="any", messages=HELLO, max_tokens=12_000, stream=True, extra_body=ENDLESS
        )
        next(iter(stream))
        fallen = running.child()
        fallen.kill()
        with pytest.raises(openai.APIError, match="llama-server ended"):
            for _ in stream:
                pass
        for _ in range(PATIENCE_S):
            answer = httpx2.post(
                f"{running.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4}, timeout=PATIENCE_S
            )
            if answer.status_code == 200:
                break
            assert answer.status_code == 503
            time.sleep(int(answer.headers["Retry-After"]))
        assert answer.json()["choices"][0]["message"]["content"]
        assert running.child().pid != fallen.pid
        assert "SIGKILL" in running.told.read_text()


def launch_of(environment: Mapping[str, str], *arguments: object) -> Launch:
    """What `serve` would start for these arguments."""
    done = refused(environment, "--print-command", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    home = Path(environment["FOUNDRY_HOME"])
    return Launch(
        argv=tuple(json.loads(done.stdout)["argv"]),
        env=child_environment(home / "no-models"),
        log=home / f"child-{time.monotonic_ns()}.log",
        what="serve",
    )


def test_a_child_that_hangs_is_started_again(environment: dict[str, str], demo_gguf: Path) -> None:
    launch = launch_of(environment, demo_gguf)

    async def hang() -> None:
        supervisor = Supervisor(launch, Patience(first_s=0.1, silent_s=1.0, ask_every_s=0.5))
        await supervisor.start()
        watch = asyncio.create_task(supervisor.watch())
        try:
            first = supervisor.pid
            assert first is not None
            os.kill(first, signal.SIGSTOP)
            deadline = time.monotonic() + PATIENCE_S
            while supervisor.restarts == 0 or supervisor.state != "ready":
                assert time.monotonic() < deadline
                assert not watch.done()
                await asyncio.sleep(0.05)
            assert not psutil.pid_exists(first)
            assert supervisor.pid != first
        finally:
            watch.cancel()
            await supervisor.stop(10)

    asyncio.run(hang())


def test_a_long_prompt_is_no_hang(environment: dict[str, str], tireless: Path) -> None:
    launch = launch_of(environment, "--n-ctx", 32768, "--parallel", 1, tireless)

    async def ask() -> None:
        supervisor = Supervisor(launch, Patience(first_s=0.1, silent_s=0.2, ask_every_s=0.1))
        await supervisor.start()
        watch = asyncio.create_task(supervisor.watch())
        try:
            async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
                answer = await client.post(
                    f"{supervisor.base_url}/v1/completions",
                    json={"prompt": [300] * 7_000, "max_tokens": 1},
                    headers={"Authorization": f"Bearer {supervisor.api_key}"},
                )
            assert answer.status_code == 200
            assert supervisor.restarts == 0
        finally:
            watch.cancel()
            await supervisor.stop(10)

    asyncio.run(ask())


def test_child_that_cannot_be_started_again_is_given_up(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    model = tmp_path / "mine.gguf"
    model.write_bytes(demo_gguf.read_bytes())
    launch = launch_of(environment, model)

    async def fall() -> None:
        supervisor = Supervisor(launch, Patience(first_s=0.01, starts=3))
        await supervisor.start()
        try:
            model.unlink()
            assert supervisor.pid is not None
            os.kill(supervisor.pid, signal.SIGKILL)
            with pytest.raises(CommandError, match="given up after 3 starts") as failure:
                await supervisor.watch()
            assert "mine.gguf" in failure.value.evidence
            assert supervisor.restarts == 3
        finally:
            await supervisor.stop(10)

    asyncio.run(fall())


def test_fallen_model_of_several_is_loaded_again(environment: dict[str, str], demo: dict[str, Any]) -> None:
    paths = {each["type"]: each["path"] for each in demo["artifacts"]}
    with serving(environment, paths["Q8_0"], paths["Q2_K"]) as running:
        for instance in running.child().children():
            instance.kill()
        for name in ("demo-Q8_0", "demo-Q2_K"):
            asked = {"model": name, "messages": HELLO, "max_tokens": 4}
            until(
                lambda asked=asked: (
                    httpx2.post(f"{running.url}/v1/chat/completions", json=asked, timeout=PATIENCE_S).status_code == 200
                ),
                f"{name} does not come back",
            )


def test_systemd_hears_when_it_is_ready_and_when_it_stops(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(PATIENCE_S)
        with serving({**environment, "NOTIFY_SOCKET": str(tmp_path / "notify")}, demo_gguf) as running:
            assert heard.recv(4096).startswith(b"READY=1\n")
            assert running.end() == 0
        assert heard.recv(4096) == b"STOPPING=1"


def test_sigterm_lets_the_stream_end_and_leaves_nothing(environment: dict[str, str], tireless: Path) -> None:
    with serving(environment, tireless, "--n-ctx", 8192, "--drain-s", PATIENCE_S) as running:
        stream = running.client(timeout=PATIENCE_S).chat.completions.create(
            model="any", messages=HELLO, max_tokens=3_000, stream=True, extra_body=ENDLESS
        )
        pieces = iter(stream)
        next(pieces)
        running.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in running.told.read_text(), "it does not stop")
        answer = httpx2.post(f"{running.url}/v1/chat/completions", json={"messages": HELLO}, timeout=PATIENCE_S)
        assert answer.status_code == 503
        last = None
        for piece in pieces:
            last = piece
        assert last is not None
        assert last.choices[0].finish_reason == "length"
        assert running.process.wait(PATIENCE_S) == 0


def test_drain_has_a_limit(environment: dict[str, str], tireless: Path) -> None:
    with serving(environment, tireless, "--n-ctx", 32768, "--drain-s", 0.2) as running:
        stream = running.client(timeout=PATIENCE_S).chat.completions.create(
            model="any", messages=HELLO, max_tokens=30_000, stream=True, extra_body=ENDLESS
        )
        next(iter(stream))
        assert running.end() == 0
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass


def test_second_signal_ends_at_once(environment: dict[str, str], tireless: Path) -> None:
    with serving(environment, tireless, "--n-ctx", 32768, "--drain-s", 3600) as running:
        stream = running.client(timeout=PATIENCE_S).chat.completions.create(
            model="any", messages=HELLO, max_tokens=30_000, stream=True, extra_body=ENDLESS
        )
        next(iter(stream))
        running.process.send_signal(signal.SIGINT)
        until(lambda: "stopping" in running.told.read_text(), "it does not stop")
        assert running.end(signal.SIGINT) == 130


def test_death_of_the_parent_takes_the_children_along(environment: dict[str, str], demo: dict[str, Any]) -> None:
    paths = [each["path"] for each in demo["artifacts"]]
    with serving(environment, *paths) as running:
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) == 1 + len(paths)
        running.process.kill()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive
