"""What ``serve`` refuses, prints instead of serving, and keeps to itself."""

from __future__ import annotations

import json
import resource
import shlex
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests import serving as fixtures
from tests.serving import HELLO, PATIENCE_S, Server, argv, refused, serving
from toolchain.base.gguf import read_header

environment, tireless = fixtures.environment, fixtures.tireless


@pytest.fixture(scope="module")
def server(environment: dict[str, str], demo_gguf: Path) -> Iterator[Server]:
    with serving(environment, demo_gguf) as running:
        yield running


def test_taken_port_names_its_holder_and_a_free_one(
    server: Server, environment: dict[str, str], demo_gguf: Path
) -> None:
    done = refused(environment, demo_gguf, "--port", server.ready["port"])
    assert done.returncode == 2
    assert str(server.process.pid) in done.stderr
    hint = next(word for word in done.stderr.split("--port ")[1:] if word)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(hint.split()[0])))


def test_printed_command_is_what_runs(server: Server, environment: dict[str, str], demo_gguf: Path) -> None:
    done = refused(environment, "--print-command", demo_gguf)
    assert done.returncode == 0
    running = server.child().cmdline()
    assert shlex.split(done.stdout) == running
    assert not any("key" in part for part in running)


def test_key_is_asked_for_and_nowhere_to_be_seen(environment: dict[str, str], demo_gguf: Path, tmp_path: Path) -> None:
    secret = "a-key-that-is-told-to-nobody-0123456789"
    key_file = tmp_path / "keys"
    key_file.write_text(f"# for the tests\n{secret}\n")
    key_file.chmod(0o600)
    with serving(environment, demo_gguf, "--host", "0.0.0.0", "--api-key-file", key_file, "--verbose") as running:
        with pytest.raises(openai.AuthenticationError):
            running.client(api_key="wrong").chat.completions.create(model="any", messages=HELLO, max_tokens=2)
        reply = running.client(api_key=secret).chat.completions.create(model="any", messages=HELLO, max_tokens=2)
        assert reply.usage is not None
        child = running.child()
        seen = " ".join(child.cmdline()) + json.dumps(child.environ()) + running.told.read_text()
        seen += json.dumps(running.ready) + Path(running.ready["log"]).read_text()
        assert secret not in seen
        assert child.environ()["LLAMA_API_KEY"] not in " ".join(child.cmdline())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("no-such-model.gguf",), 2, "no file"),
        (("{demo}", "--n-ctx", "9999999"), 2, "trained with 512"),
        (("{demo}", "--host", "0.0.0.0"), 2, "API key"),
        (("{demo}", "--ui"), 3, "`./inv build --ui`"),
        (("{demo}", "{demo}"), 2, "named twice"),
        (("{demo}", "--api-key-file", "/no/such/file"), 2, "cannot be read"),
        (("{demo}", "--parallel", "257"), 2, "between 1 and 256"),
        (("{demo}", "--pooling", "mean"), 2, "writes text"),
        (("{demo}", "--allowed-origin", "*"), 2, "API key"),
        (("{demo}", "--allowed-origin", "example.org"), 2, "SCHEME://NAME"),
        (("{demo}", "--allowed-host", "http://example.org"), 2, "NAME:PORT"),
        (("{demo}", "--port", "abc"), 2, "'abc' is no whole number"),
        (("{lie}",), 6, "lie.gguf"),
    ],
)
def test_what_cannot_be_served_is_told_and_leaves_nothing(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    lie = tmp_path / "lie.gguf"
    lie.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60) + b"\0" * 64)
    done = refused(environment, "--port", 0, *(each.format(demo=demo_gguf, lie=lie) for each in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_model_that_llama_server_refuses_is_told_in_its_words(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    architecture = read_header(demo_gguf).architecture
    strange = architecture[::-1]
    raw = demo_gguf.read_bytes().replace(f"{architecture}.".encode(), f"{strange}.".encode())
    at = raw.index(architecture.encode(), raw.index(b"general.architecture"))
    path = tmp_path / "strange.gguf"
    path.write_bytes(raw[:at] + strange.encode() + raw[at + len(strange) :])
    done = refused(environment, "--port", 0, path)
    assert done.returncode == 5
    assert f"unknown model architecture: '{strange}'" in done.stderr
    assert "log: " in done.stderr


def test_child_that_runs_out_of_memory_is_told_as_that(environment: dict[str, str], tireless: Path) -> None:
    limit = 2 << 30
    done = subprocess.run(
        argv("--port", 0, tireless, "--n-ctx", 32768, "--parallel", 40),
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 7, done.stderr
    assert "memory ran out" in done.stderr
    assert "--parallel" in done.stderr


def test_unit_is_accepted_by_systemd(environment: dict[str, str], demo_gguf: Path, tmp_path: Path) -> None:
    key_file = tmp_path / 'ke"y %n $HOME'
    key_file.write_text("0123456789\n")
    key_file.chmod(0o600)
    model = tmp_path / "a model $X %i.gguf"
    model.symlink_to(demo_gguf)
    done = refused(environment, model, "--host", "0.0.0.0", "--api-key-file", key_file, "--systemd")
    assert done.returncode == 0, done.stderr
    assert "0123456789" not in done.stdout
    unit = tmp_path / "foundry-serve.service"
    unit.write_text(done.stdout)
    try:
        verified = subprocess.run(
            ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except FileNotFoundError:
        pytest.skip("no systemd-analyze here")
    assert verified.returncode == 0, verified.stderr
