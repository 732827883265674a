"""A session on a disk that fills up, and a chat that is killed at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.conversation.tracker import Conversation
from tests.front_door import on_small_disk
from tests.generated_models import write_model
from toolchain.base.files import PROJECT_ROOT, sha256_file
from toolchain.build.toolchain import Toolchain

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"
GREEDY = ("--temp", "0", "-n", "24", "--n-ctx", "2048", "--n-threads", "1", "--n-threads-batch", "1")
LINES = "for line in one two three; do echo $line; sleep 1; done"


@pytest.fixture(scope="module")
def model(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "one.gguf"
    return write_model(path, "llama", type="f32", random=True, template=TEMPLATE, n_layer=2)


def environment(home: Path) -> dict[str, str | None]:
    return {"FOUNDRY_HOME": str(home), "FOUNDRY_NO_TUNE": "1", "PYTHONPATH": str(PROJECT_ROOT)}


def chat(model: Path) -> list[str]:
    return [sys.executable, "-m", "runtime", "chat", str(model), *GREEDY, "--session", "trip"]


def test_full_disk_is_told_each_turn_and_leaves_the_turn_before(model: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    subprocess.run(chat(model), input="one\n", env={**os.environ, **environment(whole)}, text=True, check=True)  # type: ignore[arg-type]
    first = sha256_file(whole / "sessions" / "trip" / "talk.yaml")
    home = tmp_path / "home"
    argv = ["sh", "-c", f'({LINES}) | "$@"', "sh", *chat(model)]
    done, left = on_small_disk("64m", home, argv, env=environment(home), fill_after="state.bin")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("t/s generation") == 3
    assert "of session trip was not kept: " in done.stderr
    assert left["sessions/trip/talk.yaml"] == first
    assert not [name for name in left if ".partial-" in name]


def test_chat_killed_at_any_moment_leaves_whole_turns(model: Path, tmp_path: Path) -> None:
    kept = 0
    for wait_s in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        child = subprocess.Popen(
            chat(model),
            env={**os.environ, **environment(tmp_path)},  # type: ignore[arg-type]
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"a question\n" * 400)
        child.stdin.flush()
        child.stdout.read(1)
        time.sleep(wait_s)
        child.kill()
        child.communicate()
        path = tmp_path / "sessions" / "trip" / "talk.yaml"
        conversation = Conversation.load(path) if path.exists() else Conversation()
        roles = [message["role"] for message in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) >= kept
        kept = len(roles)
    assert kept
    done = subprocess.run(
        chat(model),
        input="the last\n",
        env={**os.environ, **environment(tmp_path)},  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"session trip: {kept // 2} turn" in done.stderr
    assert "is damaged" not in done.stderr
    assert not list((tmp_path / "sessions" / "trip").glob(".partial-*"))
