"""Adapters through every door: another base is refused, none without effect goes unnoticed, scales change at work."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from runtime import LLaMa
from tests import serving as fixtures
from tests.front_door import runtime
from tests.generated_models import write_model
from tests.serving import refused, serving, until
from toolchain.base.errors import ArtifactError
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.lora.forms.adapter import AdapterModel, Pair, write_adapter

environment = fixtures.environment

TARGETS = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
GREEDY = ("--temp", "0", "-n", "12", "--n-ctx", "512", "--no-stats")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one shape, and adapters: ``own`` was trained on the first, ``mute`` does not say on what."""
    folder = tmp_path_factory.mktemp("models")
    one, two = (
        write_model(folder / f"{name}.gguf", "llama", type="f32", random=True, seed=seed, n_layer=2, template=TEMPLATE)
        for seed, name in enumerate(("one", "two"))
    )
    return {
        "one": one,
        "two": two,
        "own": adapter(folder / "own.gguf", one, trained_on=one),
        "mute": adapter(folder / "mute.gguf", one),
        "idle": adapter(folder / "idle.gguf", one, trained_on=one, size=0.0),
    }


def adapter(path: Path, shaped_as: Path, *, trained_on: Path | None = None, size: float = 2.0, seed: int = 0) -> Path:
    header, numbers = read_header(shaped_as), np.random.default_rng(seed)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}

    def matrix(*shape: int) -> Any:
        return (numbers.standard_normal(shape) * size).astype(np.float32)

    pairs = {name: Pair(a=matrix(4, shapes[name][0]), b=matrix(shapes[name][1], 4)) for name in TARGETS}
    made = AdapterModel(
        architecture="llama",
        alpha=8.0,
        pairs=pairs,
        base_sha256=tensors_sha256(read_header(trained_on)) if trained_on else "",
        base_name=trained_on.name if trained_on else "",
    )
    write_adapter(path, made)
    return path


Door = Callable[[dict[str, str], Path, tuple[object, ...]], Any]


def complete(environment: dict[str, str], model: Path, lora: tuple[object, ...]) -> Any:
    return runtime(environment, "complete", model, "-p", "hello", *GREEDY, *lora)


def chat(environment: dict[str, str], model: Path, lora: tuple[object, ...]) -> Any:
    return runtime(environment, "chat", model, *GREEDY, *lora, given="hello\n")


def embed(environment: dict[str, str], model: Path, lora: tuple[object, ...]) -> Any:
    return runtime(environment, "embed", model, "-p", "hello", *lora)


def plan(environment: dict[str, str], model: Path, lora: tuple[object, ...]) -> Any:
    return runtime(environment, "plan", model, *lora)


def print_command(environment: dict[str, str], model: Path, lora: tuple[object, ...]) -> Any:
    return runtime(environment, "serve", model, "--print-command", *lora)


DOORS = (complete, chat, embed, plan, print_command)


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_of_another_base_is_refused_by_name(
    environment: dict[str, str], models: dict[str, Path], door: Door
) -> None:
    done = door(environment, models["two"], ("--lora", models["own"]))
    assert done.returncode == 6, done.stderr
    assert "the adapter own.gguf was not trained on two.gguf" in done.stderr
    for model in ("one", "two"):
        assert f"{model}.gguf  ({tensors_sha256(read_header(models[model]))[:12]}" in done.stderr
    assert "load one.gguf" in done.stderr
    assert "--force" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("door", DOORS)
def test_another_base_is_taken_by_force_with_a_warning(
    environment: dict[str, str], models: dict[str, Path], door: Door
) -> None:
    done = door(environment, models["two"], ("--lora", models["own"], "--force"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("own.gguf was trained on one.gguf") == 1
    assert done.stdout != ""


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_without_effect_is_told_once(
    environment: dict[str, str], models: dict[str, Path], door: Door
) -> None:
    zero = door(environment, models["one"], ("--lora", models["idle"]))
    assert zero.returncode == 0, zero.stderr
    assert zero.stderr.count("idle.gguf changes nothing: all of its deltas are zero") == 1
    rests = door(environment, models["one"], ("--lora", f"{models['own']}=0"))
    assert rests.stderr.count("own.gguf changes nothing: its scale is 0") == 1


def test_an_adapter_that_does_not_say_its_base_is_taken_and_no_hash_is_made(
    environment: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "toolchains").symlink_to((Path(environment["FOUNDRY_HOME"]) / "toolchains").resolve())
    own = {**environment, "FOUNDRY_HOME": str(home)}
    done = complete(own, models["two"], ("--lora", models["mute"]))
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("tensors-*.json"))
    assert complete(own, models["one"], ("--lora", models["own"])).returncode == 0
    assert len(list(home.rglob("tensors-*.json"))) == 1


def test_the_text_changes_at_scale_1_and_is_the_models_at_scale_0(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    plain, full, off = (
        complete(environment, models["one"], lora).stdout
        for lora in ((), ("--lora", models["own"]), ("--lora", f"{models['own']}=0"))
    )
    assert plain == off != full


def test_a_shape_that_does_not_fit_is_told_before_the_model_is_read(
    environment: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    wide = write_model(tmp_path / "wide.gguf", "llama", type="f32", random=True, n_layer=2, n_embd=512)
    done = complete(environment, models["two"], ("--lora", adapter(tmp_path / "w.gguf", wide, trained_on=wide)))
    assert done.returncode == 6
    assert "w.gguf does not fit blk.0.attn_q.weight" in done.stderr
    assert "not trained on" not in done.stderr


def test_an_adapter_that_only_a_merge_can_apply_is_sent_there(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    path = models["one"].with_name("dora.gguf")
    shape = {tensor.name: tensor.shape for tensor in read_header(models["one"]).tensors}[TARGETS[0]]
    pair = Pair(
        a=np.ones((1, shape[0]), np.float32),
        b=np.ones((shape[1], 1), np.float32),
        magnitude=np.ones(shape[1], np.float32),
    )
    write_adapter(path, AdapterModel(architecture="llama", alpha=1.0, pairs={TARGETS[0]: pair}))
    done = complete(environment, models["one"], ("--lora", path))
    assert done.returncode == 2
    assert "inv merge" in done.stderr


def test_a_plan_counts_the_adapters_bytes(environment: dict[str, str], models: dict[str, Path]) -> None:
    device = json.loads(plan(environment, models["one"], ("--lora", models["own"], "--json")).stdout)["devices"][0]
    without = json.loads(plan(environment, models["one"], ("--json",)).stdout)["devices"][0]
    size = read_header(models["own"]).tensor_bytes
    assert without["adapters_bytes"] == 0
    assert size <= device["adapters_bytes"] < size + 128 * 4


# In a running chat


def test_scales_change_in_a_chat_and_the_conversation_stays(
    environment: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    own, say = models["own"], "hello\n/undo\n"
    link = tmp_path / "same.gguf"
    link.symlink_to(own)
    lines = f"{say}/lora {own}=0\n{say}/lora own.gguf=1\n{say}/lora {link}=0\n{say}/lora {own}\n{say}/lora -\n{say}"
    done = runtime(environment, "chat", models["one"], *GREEDY, given=lines)
    assert done.returncode == 0, done.stderr
    plain = chat(environment, models["one"], ()).stdout
    adapted = chat(environment, models["one"], ("--lora", own)).stdout
    assert plain != adapted
    assert done.stdout == plain + plain + adapted + plain + adapted + plain
    at = [line.rpartition(" at ")[2] for line in done.stderr.splitlines() if line.startswith(f"{own} at ")]
    assert at == ["0", "1", "0", "1"]


def test_an_adapter_that_started_at_rest_is_not_loaded_twice(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    lines = "/lora\n/lora own.gguf=1\n/lora own.gguf=0.5\n"
    done = runtime(
        environment, "chat", models["one"], *GREEDY, "--verbose", "--lora", f"{models['own']}=0", given=lines
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loading lora adapter from") == 1


def test_an_adapter_that_was_written_again_is_read_again(
    environment: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    from tests.e2e.test_chat_pipe import running, type_in, wait_for_line

    path = adapter(tmp_path / "new.gguf", models["one"])
    with running(environment, models["one"], *GREEDY[:-1], "--verbose", "--lora", path) as child:
        type_in(child, "hello\n")
        wait_for_line(child, "t/s generation")
        adapter(path, models["one"], seed=1)
        type_in(child, f"/lora {path}\n")
        wait_for_line(child, "loading lora adapter from")
        wait_for_line(child, "new.gguf at 1")


def test_a_chat_refuses_another_base_unless_it_is_insisted_on(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    lines = f"/lora {models['own']}\n/lora\n/lora! {models['own']}\nhello\n"
    done = runtime(environment, "chat", models["two"], *GREEDY, given=lines)
    assert done.returncode == 6
    assert f"/lora! {models['own']} insists" in done.stderr
    assert "no adapters" in done.stderr
    assert f"{models['own']} at 1" in done.stderr
    assert done.stdout == chat(environment, models["two"], ("--lora", models["own"], "--force")).stdout


# In a program


def test_a_program_is_refused_another_base_and_may_insist(
    models: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match=r"not trained on two\.gguf") as refused:
        LLaMa(models["two"], lora=models["own"], tune=False)
    assert "force_adapters=True" in refused.value.hint
    with LLaMa(models["two"], tune=False) as llm:

        def said() -> str:
            return llm.create_native_completion("hello", temperature=0, max_tokens=12)

        plain = said()
        with pytest.raises(ArtifactError, match=r"not trained on two\.gguf"):
            llm.set_adapters(models["own"])
        with pytest.raises(ArtifactError, match=r"not trained on two\.gguf"):
            llm.reload(lora=models["own"])
        assert said() == plain
        llm.set_adapters(models["own"], force=True)
        changed = said()
        llm.reload()
        assert said() == changed != plain
        capfd.readouterr()
        llm.set_adapters(models["idle"], force=True)
        llm.set_adapters((models["idle"], 0.5))
        assert capfd.readouterr().err.count("idle.gguf changes nothing") == 1
    with LLaMa(models["two"], lora=models["own"], force_adapters=True, tune=False) as llm:
        assert said() == changed


# In a running server


def asked(url: str, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


PROMPT = "The class statement is used to define a new type"


def said(url: str, **more: Any) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were not computed anew."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
    status, reply = asked(url, "/v1/completions", body)
    assert status == 200, reply
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_scales_change_in_a_server_for_everybody_and_for_one_request(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    """Each reply has the text of a cold one: nothing that was computed at another scale is gone on from."""
    on, off = [{"id": 0, "scale": 1}], [{"id": 0, "scale": 0}]
    options = ("--allow-admin", "--parallel", "1", "--n-ctx", "512", "--lora", f"{models['own']}=0")
    with serving(environment, models["one"], *options) as server:
        assert server.ready["models"][0]["adapters"] == [{"id": 0, "path": str(models["own"]), "scale": 0.0}]
        assert "adapter 0: own.gguf at 0" in server.told.read_text()
        listed = asked(server.url, "/lora-adapters")[1]
        assert [(each["id"], each["path"], each["scale"]) for each in listed] == [(0, "own.gguf", 0.0)]
        plain, adapted = (said(server.url, lora=each, cache_prompt=False)[0] for each in (off, on))
        assert plain != adapted
        assert said(server.url)[0] == plain
        assert asked(server.url, "/lora-adapters", on) == (200, {"success": True})
        assert said(server.url)[0] == adapted
        again, cached = said(server.url)
        assert again == adapted
        assert cached > 0
        assert said(server.url, lora=off)[0] == plain
        assert said(server.url)[0] == adapted
        for wrong in ([{"id": 1, "scale": 1}], [{"id": 0, "scale": "much"}], {"id": 0}):
            assert asked(server.url, "/v1/completions", {"prompt": "x", "max_tokens": 1, "lora": wrong})[0] == 400
            assert asked(server.url, "/lora-adapters", wrong)[0] == 400
        assert asked(server.url, "/lora-adapters")[1][0]["scale"] == 1.0
        before = server.child()
        psutil.Process(before.pid).kill()
        until(lambda: asked(server.url, "/ready")[0] == 200 and server.child() != before, "it was not started again")
        assert said(server.url)[0] == plain


def test_clients_at_once_are_each_answered_at_their_own_scales(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    """One prompt at several scales, more clients than slots: no reply goes on from what another's scale computed."""
    with serving(environment, models["one"], "--parallel", "2", "--n-ctx", "512", "--lora", models["own"]) as server:
        asks: list[dict[str, Any]] = [{}, *({"lora": [{"id": 0, "scale": scale}]} for scale in (0, 1, -1))]
        cold = [said(server.url, cache_prompt=False, **more)[0] for more in asks]
        assert cold[0] == cold[2]
        assert len({*cold}) == 3
        with ThreadPoolExecutor(6) as clients:
            warm = clients.map(lambda more: said(server.url, **more)[0], asks * 6)
        assert list(warm) == cold * 6


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}),
        ("/v1/responses", {"input": PROMPT, "max_output_tokens": 8}),
        ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}),
        ("/completion", {"prompt": PROMPT, "n_predict": 8}),
    ],
)
def test_every_api_answers_at_the_scales_of_the_moment(
    environment: dict[str, str], models: dict[str, Path], path: str, body: dict[str, Any]
) -> None:
    def answer(url: str) -> str:
        _, reply = asked(url, path, {"model": "one", "temperature": 0, **body})
        found = reply.get("choices") or reply.get("output") or reply.get("content")
        return json.dumps(found).partition('"id"')[0]

    with serving(environment, models["one"], "--allow-admin", "--parallel", "1", "--lora", models["own"]) as server:
        adapted = answer(server.url)
        assert asked(server.url, "/lora-adapters", [{"id": 0, "scale": 0}])[0] == 200
        plain = answer(server.url)
    with serving(environment, models["one"], "--parallel", "1") as server:
        assert answer(server.url) == plain != adapted


def test_a_chat_with_a_server_switches_scales_for_itself_alone(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    say = "hello\n/undo\n"
    lines = f"/lora\n{say}/lora own.gguf=1\n{say}/lora 0=0.0\n{say}/lora 0\n/lora -\n{say}/lora x.gguf\n/lora 0=x\n"
    with serving(environment, models["one"], "--parallel", "1", "--lora", f"{models['own']}=0") as server:
        options = ("--endpoint", server.url, "--temp", "0", "-n", "12", "--no-stats")
        done = runtime(environment, "chat", *options, given=lines)
        assert asked(server.url, "/lora-adapters")[1][0]["scale"] == 0.0
    assert done.returncode == 2
    plain, adapted, *rest = done.stdout.splitlines()
    assert plain != adapted
    assert rest == [plain, plain]
    at = [line for line in done.stderr.splitlines() if line.startswith("0 own.gguf at ")]
    assert [line.rpartition(" ")[2] for line in at] == ["0", "1", "0", "1", "0"]
    assert "the server has no adapter x.gguf" in done.stderr
    assert "'x' is not a scale" in done.stderr


def test_nobody_switches_adapters_where_it_was_not_allowed(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    with serving(environment, models["one"], "--parallel", "1", "--lora", models["own"]) as server:
        status, reply = asked(server.url, "/lora-adapters", [])
        assert (status, "--allow-admin" in reply["error"]["message"]) == (403, True)
        assert said(server.url)[0] != said(server.url, lora=[{"id": 0, "scale": 0}])[0]


def test_a_server_with_an_adapter_of_another_base_does_not_start(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    done = refused(environment, models["two"], "--port", "0", "--lora", models["own"])
    assert done.returncode == 6
    assert "not trained on two.gguf" in done.stderr


def test_generated_adapters_are_what_llama_cpp_reads(models: dict[str, Path]) -> None:
    names = {tensor.name for tensor in gguf.GGUFReader(models["own"]).tensors}
    assert names == {f"{target}.lora_{half}" for target in TARGETS for half in "ab"}
