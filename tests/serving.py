"""``python -m runtime serve`` as a child process: started on a free port, asked through the openai client, ended."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from toolchain.base.files import PROJECT_ROOT
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain

PATIENCE_S = 120
HELLO: Any = [{"role": "user", "content": "What is a class?"}]
ENDLESS = {"ignore_eos": True}
"""The demo model may end a reply at any time; with this it goes on to the limit."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, toolchain: Toolchain) -> dict[str, str]:
    """A FOUNDRY_HOME of our own that borrows the Toolchains."""
    home = tmp_path_factory.mktemp("home")
    (home / "toolchains").symlink_to(toolchain.root.resolve().parent)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FOUNDRY_", "LLAMA_"))}
    own = {"FOUNDRY_HOME": str(home), "FOUNDRY_NO_TUNE": "1", "TERM": "dumb", "PYTHONPATH": str(PROJECT_ROOT)}
    return {**clean, "GOMP_SPINCOUNT": "100", **own}


@pytest.fixture(scope="module")
def tireless(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, said to have been trained with 32,768 tokens: replies long enough to be disturbed."""
    header = read_header(demo_gguf)
    key = f"{header.architecture}.context_length".encode()
    raw = bytearray(demo_gguf.read_bytes())
    struct.pack_into("<I", raw, raw.index(key) + len(key) + 4, 32_768)
    path = tmp_path_factory.mktemp("tireless") / "tireless.gguf"
    path.write_bytes(raw)
    return path


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running ``serve`` and what it said when it was ready."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    told: Path

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def child(self) -> psutil.Process:
        """The llama-server of the moment."""
        found = psutil.Process(self.process.pid).children()
        assert len(found) == 1, found
        return found[0]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def argv(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "runtime", "serve", *map(str, arguments)]


@contextmanager
def serving(environment: Mapping[str, str], *arguments: object) -> Iterator[Server]:
    """A server on a free port, once it is ready; ended, and all that it started, whatever happens."""
    told = Path(environment["FOUNDRY_HOME"]) / f"stderr-{time.monotonic_ns()}"
    with told.open("w") as stderr:
        process = subprocess.Popen(
            argv("--port", 0, "--json", *arguments), env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        assert lines, told.read_text()
        family = psutil.Process(process.pid).children(recursive=True)
        yield Server(process=process, ready=json.loads("".join(lines)), told=told)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout:
            process.stdout.close()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        for each in alive:
            each.kill()
        assert not alive, f"left behind: {alive}"


def refused(environment: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv(*arguments), env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def until(found: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
