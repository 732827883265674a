"""Conversations with a real llama-server of the Toolchain over HTTP, in a program and on the command line."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from runtime.chat.backend import Backend, ContextFullError, Figures, ReplyOptions
from runtime.chat.endpoint import connect
from runtime.engine.sampling import SamplingOptions
from runtime.interrupts import Interrupt
from tests.failing_server import answer, chat, failing_server
from tests.front_door import runtime
from toolchain.base.errors import FetchError
from toolchain.base.files import PROJECT_ROOT
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain

PATIENCE_S = 120
KEY = "sk-of-the-e2e-tests"
N_CTX = 8192
HELLO = [{"role": "user", "content": "The class statement"}]


@dataclass(frozen=True, kw_only=True)
class LlamaServer:
    url: str

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False)

    def busy(self) -> bool:
        """Whether a reply is being written."""
        return any(slot["is_processing"] for slot in self.get("/slots").json())


@pytest.fixture(scope="module")
def server(demo_gguf: Path, toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """The demo model, said to know a longer context so that replies can be long, behind a key on a free port."""
    folder = tmp_path_factory.mktemp("server")
    model = folder / "tireless.gguf"
    header = read_header(demo_gguf)
    raw = bytearray(demo_gguf.read_bytes())
    key = f"{header.architecture}.context_length".encode()
    struct.pack_into("<I", raw, raw.index(key) + len(key) + 4, N_CTX)
    model.write_bytes(raw)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [toolchain.bin_dir / "llama-server", "--model", model, "--alias", "demo", "--ctx-size", N_CTX]
    rest = ["--host", "127.0.0.1", "--port", port, "--parallel", 1, "--threads", 1, "--chat-template", "chatml"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(part) for part in (*program, *rest, "--slots")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LLAMA_API_KEY": KEY, "GOMP_SPINCOUNT": "100"},
        )
        try:
            found = LlamaServer(url=f"http://127.0.0.1:{port}")
            until = time.monotonic() + PATIENCE_S
            while not _ready(found):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.1)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(server: LlamaServer) -> bool:
    try:
        return server.get("/health").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture
def backend(server: LlamaServer) -> Iterator[Backend]:
    found = connect(server.url, model=None, api_key=KEY)
    yield found
    found.close()


def reply(backend: Backend, messages: Sequence[Any] = HELLO, **how: Any) -> tuple[str, Figures]:
    options = {name: how.pop(name) for name in ("json_schema", "stops") if name in how}
    limit = how.pop("max_tokens", 24)
    sampling = SamplingOptions(**{"seed": 1, **how})
    pieces = list(backend.reply(messages, ReplyOptions(sampling=sampling, max_tokens=limit, **options), Interrupt()))
    assert pieces[-1].figures is not None
    return "".join(piece.text for piece in pieces), pieces[-1].figures


def test_server_is_known_with_its_model_and_context(backend: Backend) -> None:
    assert (backend.name, backend.n_ctx, backend.sees) == ("demo", N_CTX, False)


def test_reply_has_the_servers_figures(backend: Backend) -> None:
    text, figures = reply(backend, max_tokens=8)
    assert text
    assert figures.prompt_tokens == backend.count(HELLO)
    assert figures.completion_tokens is not None
    assert 0 < figures.completion_tokens <= 8
    assert figures.finish_reason in ("length", "stop")
    assert figures.generation_tps
    again = reply(backend, max_tokens=8)[1]
    assert again.prompt_tokens == figures.prompt_tokens
    assert again.cached_tokens


@pytest.mark.parametrize("seed", [5, 4_000_000_000])
def test_same_seed_gives_the_same_reply(backend: Backend, seed: int) -> None:
    assert reply(backend, seed=seed)[0] == reply(backend, seed=seed)[0]


def test_every_sampling_option_is_taken(server: LlamaServer) -> None:
    options: dict[str, Any] = {
        "temp": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical": 0.98, "top_nsigma": 2.0,
        "xtc_probability": 0.1, "xtc_threshold": 0.2, "dynatemp_range": 0.1, "dynatemp_exp": 1.1,
        "repeat_penalty": 1.1, "repeat_last_n": 32, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "dry_multiplier": 0.8, "dry_base": 1.8, "dry_allowed_length": 3, "dry_penalty_last_n": 40,
        "dry_sequence_breakers": ("\n",), "mirostat": 2, "mirostat_lr": 0.2, "mirostat_ent": 4.0,
    }  # fmt: skip
    with failing_server(chat("a"), models=[{"id": "demo", "owned_by": "llamacpp"}]) as recorder:
        reply(connect(recorder.url, model=None, api_key=None), **options)
        asked = recorder.chats[0].json()
    answered = httpx2.post(
        f"{server.url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {KEY}"},
        json={**asked, "stream": False, "stream_options": None, "max_tokens": 2, "verbose": True},
        timeout=PATIENCE_S,
        trust_env=False,
    ).json()
    used = answered["__verbose"]["generation_settings"]
    names = set(asked) & set(used) - {"stream", "max_tokens"}
    assert len(names) >= len(options)
    for name in names:
        assert used[name] == (pytest.approx(asked[name]) if isinstance(asked[name], float) else asked[name]), name


def test_schema_and_grammar_and_stop_and_bias_are_followed(backend: Backend) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    found = json.loads(reply(backend, json_schema=json.dumps(schema), max_tokens=200)[0])
    assert isinstance(found["a"], bool)
    assert reply(backend, grammar='root ::= "only this"')[0] == "only this"
    assert reply(backend, grammar='root ::= "only this"', stops=("this",))[0] == "only "
    assert len(reply(backend, max_tokens=None, grammar='root ::= "a" | "b"')[0]) == 1


def test_stopped_reply_frees_the_server(backend: Backend, server: LlamaServer) -> None:
    interrupt, texts = Interrupt(), []
    endless = ReplyOptions(sampling=SamplingOptions(grammar="root ::= [a-z ]*", logit_bias={2: float("-inf")}))
    for piece in backend.reply(HELLO, endless, interrupt):
        texts.append(piece.text)
        interrupt.raised = len(texts) >= 3
    assert piece.figures is not None
    assert piece.figures.finish_reason == "cancelled"
    assert piece.figures.completion_tokens is not None
    until = time.monotonic() + 30
    while server.busy():
        assert time.monotonic() < until, "the server writes on"
        time.sleep(0.05)


def test_reply_is_stopped_while_the_prompt_is_read(backend: Backend, server: LlamaServer) -> None:
    interrupt = Interrupt()
    timer = threading.Timer(0.05, lambda: setattr(interrupt, "raised", True))
    timer.start()
    long = [{"role": "user", "content": f"{time.monotonic_ns()}" + " word" * 6000}]
    sampling = SamplingOptions(seed=1)
    pieces = list(backend.reply(long, ReplyOptions(sampling=sampling, max_tokens=4000), interrupt))
    assert pieces[-1].figures is not None
    assert reply(backend, max_tokens=2)[0]


def test_conversation_that_is_too_long_is_told(backend: Backend) -> None:
    with pytest.raises(ContextFullError, match="longer than the server's context"):
        reply(backend, [{"role": "user", "content": "word " * N_CTX}])


def test_wrong_key_is_told(server: LlamaServer) -> None:
    for key, sentence in ((None, "wants a key"), ("sk-wrong", "refused the key")):
        with pytest.raises(FetchError, match=sentence):
            connect(server.url, model=None, api_key=key)


def chat_on_pipe(
    tmp_path: Path, url: str, given: str, *arguments: str, key: str | None = None
) -> subprocess.CompletedProcess[str]:
    secret = ("FOUNDRY_", "OPENAI_", "LLAMA_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(secret)}
    own = {"FOUNDRY_HOME": str(tmp_path / "home"), "TERM": "dumb", "PYTHONPATH": str(PROJECT_ROOT)}
    environment = {**clean, **own, **({"FOUNDRY_API_KEY": key} if key else {})}
    return runtime(environment, "chat", "--endpoint", url, *arguments, given=given)


def test_chat_talks_with_a_server(server: LlamaServer, tmp_path: Path) -> None:
    done = chat_on_pipe(tmp_path, server.url, "The class statement\nAnd more\n", "-n", "8", "--seed", "1", key=KEY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "prompt tokens" in done.stderr
    assert KEY not in done.stdout + done.stderr


def test_chat_goes_on_after_a_failure_and_ends_with_its_code(tmp_path: Path) -> None:
    with failing_server(answer(403), chat("second reply")) as failing:
        done = chat_on_pipe(tmp_path, failing.url, "one\ntwo\n", key=KEY)
    assert done.returncode == 4
    assert done.stdout == "second reply\n"
    assert "does not allow" in done.stderr
    assert [message["content"] for message in failing.chats[1].json()["messages"]] == ["two"]
    assert KEY not in done.stderr


def test_chat_with_a_server_that_is_not_there_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = chat_on_pipe(tmp_path, f"http://127.0.0.1:{port}", "hello\n")
    assert done.returncode == 4
    assert "nothing listens" in done.stderr
    assert "Traceback" not in done.stderr
