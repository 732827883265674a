"""`python -m runtime chat --endpoint` talking with `python -m runtime serve`: both front doors at once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.front_door import runtime
from tests.serving import Server, environment, serving

__all__ = ["environment"]

KEY = "a-key-of-the-test"
SCHEMA = (
    '{"type": "object", "properties": {"is": {"enum": ["yes", "no"]}}, "required": ["is"], '
    '"additionalProperties": false}'
)


@pytest.fixture(scope="module")
def server(environment: dict[str, str], demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models behind one door that asks for a key."""
    folder = tmp_path_factory.mktemp("models")
    models = [folder / "first.gguf", folder / "second.gguf"]
    for model in models:
        model.symlink_to(demo_gguf)
    key_file = folder / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    with serving(environment, *models, "--api-key-file", key_file, "--parallel", 1) as running:
        yield running


def chat(
    server: Server, environment: Mapping[str, str], given: str, *arguments: str, key: str = KEY
) -> subprocess.CompletedProcess[str]:
    keyed = {**environment, "FOUNDRY_API_KEY": key}
    done = runtime(keyed, "chat", "--endpoint", server.url, *arguments, given=given)
    assert "Traceback" not in done.stderr
    assert key not in done.stdout + done.stderr
    return done


def test_talk_goes_on_from_one_model_to_the_other(server: Server, environment: dict[str, str]) -> None:
    given = "What is a class?\n/model\n/model second\nAnd an instance?\n"
    done = chat(server, environment, given, "--endpoint-model", "first", "-n", "8", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "first; the server also has second" in done.stderr
    assert "second; the conversation stays" in done.stderr
    assert done.stderr.count("prompt tokens") == 2


def test_several_models_want_a_name(server: Server, environment: dict[str, str]) -> None:
    done = chat(server, environment, "hello\n")
    assert done.returncode == 2
    assert "--endpoint-model first" in done.stderr


def test_reply_of_a_served_model_follows_a_schema(server: Server, environment: dict[str, str]) -> None:
    arguments = ("--endpoint-model", "first", "--json-schema", SCHEMA, "-n", "60", "--temp", "0")
    done = chat(server, environment, "Is a class an object?\n", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["is"] in ("yes", "no")


def test_wrong_key_is_refused_with_its_code(server: Server, environment: dict[str, str]) -> None:
    done = chat(server, environment, "hello\n", "--endpoint-model", "first", key="a-wrong-key")
    assert done.returncode == 4
    assert "refused the key" in done.stderr
