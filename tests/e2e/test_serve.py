"""``serve`` answers as OpenAI's API promises: chat, streams, tools, schemas, vectors, several models."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests import serving as fixtures
from tests.generated_models import Family, write_model
from tests.generated_vision import picture, write_mmproj, write_text_model
from tests.serving import ENDLESS, HELLO, PATIENCE_S, Server, serving, until
from tests.tiny_bert import write_bert
from toolchain.base.files import PROJECT_ROOT

environment, tireless = fixtures.environment, fixtures.tireless


WITH_TOOLS = """\
{%- if tools %}<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
A call is {"name": NAME, "parameters": OBJECT}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.tool_calls %}
{%- for call in message.tool_calls -%}
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- endfor %}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TO_THE_POINT = {"logit_bias": [["{", 100]]}
"""llama-server lets a model talk before a required call; the demo model would talk for ever."""


@pytest.fixture(scope="module")
def server(environment: dict[str, str], demo_gguf: Path) -> Iterator[Server]:
    with serving(environment, demo_gguf) as running:
        yield running


def with_template(model: Path, path: Path, template: str) -> Path:
    """A copy of ``model`` at ``path`` with a chat template."""
    copy = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template, str(model), str(path)]
    subprocess.run(copy, capture_output=True, timeout=PATIENCE_S, check=True)
    return path


def test_chat_is_answered_by_the_model_that_was_named(server: Server, demo_gguf: Path) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [demo_gguf.stem]
    reply = client.chat.completions.create(model=demo_gguf.stem, messages=HELLO, max_tokens=12)
    assert reply.model == demo_gguf.stem
    assert reply.choices[0].message.content
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 12


def test_stream_is_the_reply_in_pieces(server: Server) -> None:
    client = server.client()
    asked: Any = {"model": "any", "messages": HELLO, "max_tokens": 24, "temperature": 0, "extra_body": ENDLESS}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert len(pieces) > 5
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole
    assert pieces[-1].choices[0].finish_reason == "length"


def test_required_tool_is_called_with_arguments_of_its_schema(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    model = with_template(demo_gguf, tmp_path / "caller.gguf", WITH_TOOLS)
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    tool: Any = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": schema}}
    with serving(environment, model) as running:
        reply = running.client().chat.completions.create(
            model="any",
            messages=HELLO,
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=100,
            temperature=0,
            extra_body=TO_THE_POINT,
        )
    calls = reply.choices[0].message.tool_calls
    assert calls, reply
    assert calls[0].type == "function"
    assert calls[0].function.name == "add"
    assert isinstance(json.loads(calls[0].function.arguments)["sure"], bool)


def test_reply_follows_a_json_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["yes", "kind"],
        "additionalProperties": False,
    }
    asked: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    reply = server.client().chat.completions.create(model="any", messages=HELLO, response_format=asked, max_tokens=60)
    found = json.loads(reply.choices[0].message.content or "")
    assert set(found) == {"yes", "kind"}
    assert found["kind"] in ("a", "b")


def test_logprobs_come_with_their_rivals(server: Server) -> None:
    reply = server.client().chat.completions.create(
        model="any", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3, temperature=0, extra_body=ENDLESS
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(rival.logprob for rival in token.top_logprobs) <= 0


def test_embedding_model_is_served_for_vectors(environment: dict[str, str], tmp_path: Path) -> None:
    model = write_bert(tmp_path / "vectors.gguf")
    texts = ["the cat sat", "a dog ran far away", "the cat sat"]
    with serving(environment, model) as running:
        found = running.client().embeddings.create(model="vectors", input=texts, encoding_format="float").data
        assert [model["purpose"] for model in running.ready["models"]] == ["embeddings"]
        assert "vectors only" in running.told.read_text()
    assert [len(each.embedding) for each in found] == [64, 64, 64]
    assert found[0].embedding == pytest.approx(found[2].embedding, abs=1e-5)
    assert found[0].embedding != pytest.approx(found[1].embedding, abs=1e-3)
    embedded = subprocess.run(
        [sys.executable, "-m", "runtime", "embed", str(model), "-p", texts[0]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert found[0].embedding == pytest.approx(json.loads(embedded.stdout), abs=2e-3)


def test_each_client_has_the_whole_context_while_the_others_use_theirs(
    environment: dict[str, str], tireless: Path
) -> None:
    n_ctx, clients = 2048, 3
    with serving(environment, tireless, "--n-ctx", n_ctx, "--parallel", clients) as running:
        assert (running.ready["parallel"], running.ready["models"][0]["n_ctx"]) == (clients, n_ctx)
        client = running.client(timeout=PATIENCE_S)

        def ask(number: int, tokens: int) -> openai.types.Completion:
            return client.completions.create(
                model="any", prompt=[300 + number] * tokens, max_tokens=64, extra_body=ENDLESS
            )

        with ThreadPoolExecutor(clients) as pool:
            replies = list(pool.map(lambda number: ask(number, n_ctx - 70), range(clients)))
        for reply in replies:
            assert reply.usage is not None
            assert reply.usage.completion_tokens == 64
            assert reply.usage.prompt_tokens >= n_ctx - 70
        with pytest.raises(openai.BadRequestError, match="context"):
            ask(9, n_ctx + 1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "granitehybrid", "lfm2"])
def test_plan_of_separate_contexts_is_the_librarys_to_the_byte(tmp_path: Path, family: Family) -> None:
    """In a process of its own, which loads the library."""
    code = """
import json, sys
from dataclasses import replace
from pathlib import Path
from runtime.memory.ask_library import ask
from runtime.memory.footprint import CUDA, Demand, Placement, footprint, repacked_types
from toolchain.base import machine
from toolchain.base.gguf import read_header
path = Path(sys.argv[1])
traits, host = replace(CUDA, repacked=repacked_types(machine.probe().cpu_flags)), Placement(n_gpu_layers=0)
pairs = []
for clients, each in ((1, 512), (4, 2048), (3, 1000)):
    demand = Demand(n_ctx=clients * each, n_seq_max=clients, n_outputs_max=16)
    found = footprint([read_header(path)], demand, host, 0, traits=traits)[0], ask(path, demand, host)[0]
    pairs.append([[size.weights, size.kv, size.compute] for size in found])
print(json.dumps(pairs))
"""
    model = write_model(tmp_path / f"{family}.gguf", family)
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    for ours, theirs in json.loads(done.stdout):
        assert ours == theirs


def test_several_models_are_served_by_name_each_with_its_own_settings(
    environment: dict[str, str], demo: dict[str, Any], tireless: Path
) -> None:
    paths = {each["type"]: each["path"] for each in demo["artifacts"]}
    with serving(environment, paths["Q8_0"], paths["Q2_K"], tireless, "--parallel", 2) as running:
        client = running.client(timeout=PATIENCE_S)
        assert {model.id for model in client.models.list()} == {"demo-Q8_0", "demo-Q2_K", "tireless"}
        for name in ("demo-Q8_0", "demo-Q2_K", "tireless", paths["Q2_K"]):
            reply = client.chat.completions.create(model=name, messages=HELLO, max_tokens=4)
            assert reply.choices[0].message.content
        listed = httpx2.get(f"{running.url}/v1/models").json()["data"]
        assert {model["status"]["value"] for model in listed} == {"loaded"}
        assert not any({"args", "preset"} & model["status"].keys() for model in listed)
        assert httpx2.get(f"{running.url}/props?model=tireless").json()["model_path"] == tireless.name
        with pytest.raises(openai.BadRequestError, match="nobody"):
            client.chat.completions.create(model="nobody", messages=HELLO)
        contexts = {model["name"]: model["n_ctx"] for model in running.ready["models"]}
        assert contexts == {"demo-Q8_0": 512, "demo-Q2_K": 512, "tireless": 4096}
        instances = [process.cmdline() for process in running.child().children()]
        assert {args[args.index("--alias") + 1]: args[args.index("--ctx-size") + 1] for args in instances} == {
            "demo-Q8_0": "1024",
            "demo-Q2_K": "1024",
            "tireless": "8192",
        }


def test_picture_that_comes_along_is_seen_and_one_elsewhere_is_not_fetched(
    environment: dict[str, str], tmp_path: Path
) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model, eye = write_text_model(tmp_path / "eye.gguf", template=template), write_mmproj(tmp_path / "mmproj.gguf", 64)
    along = f"data:image/png;base64,{base64.b64encode(picture('cat')).decode()}"
    with (
        serving(environment, model, "--mmproj", eye) as running,
        socket.create_server(("127.0.0.1", 0)) as elsewhere,
    ):

        def ask(url: str) -> Any:
            part: Any = {"type": "image_url", "image_url": {"url": url}}
            messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "say"}]}]
            return running.client(timeout=PATIENCE_S).chat.completions.create(
                model="eye", messages=messages, max_tokens=2
            )

        assert ask(along).usage.prompt_tokens > 0
        with pytest.raises(openai.PermissionDeniedError, match="data: URL"):
            ask(f"http://127.0.0.1:{elsewhere.getsockname()[1]}/picture.png")
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_only_as_many_models_are_loaded_as_were_allowed(environment: dict[str, str], demo: dict[str, Any]) -> None:
    paths = {each["type"]: each["path"] for each in demo["artifacts"]}
    with serving(environment, paths["Q8_0"], paths["Q2_K"], "--models-max", 1) as running:
        client = running.client(timeout=PATIENCE_S)
        for name in ("demo-Q8_0", "demo-Q2_K", "demo-Q8_0"):
            assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=4).choices[0].message.content
        until(lambda: len(running.child().children()) == 1, "both models stay loaded")


def test_recipes_folder_serves_what_has_a_result(environment: dict[str, str], demo: dict[str, Any]) -> None:
    with serving(environment, PROJECT_ROOT / "recipes") as running:
        assert "demo" in [model["name"] for model in running.ready["models"]]
