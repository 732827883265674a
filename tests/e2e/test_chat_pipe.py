"""``python -m runtime chat`` on a pipe with real engines: generated models with a chat template."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.conversation.tracker import Conversation
from tests.e2e.test_engine_state import write_adapter
from tests.front_door import runtime
from tests.generated_models import write_model
from tests.generated_vision import N_TOKENS, picture, write_mmproj, write_text_model
from toolchain.base.files import PROJECT_ROOT
from toolchain.build.toolchain import Toolchain

PATIENCE_S = 120
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"
YES_OR_NO = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
GREEDY = ("--temp", "0", "-n", "12", "--n-ctx", "512", "--n-threads", "2", "--n-threads-batch", "2")


@pytest.fixture(scope="module")
def models(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models that speak bytes: two plain ones, one that thinks, one whose template fails; one of an unknown
    architecture, and an adapter.
    """
    folder = tmp_path_factory.mktemp("models")

    def made(name: str, *, seed: int = 0, template: str = TEMPLATE) -> Path:
        path = folder / f"{name}.gguf"
        return write_model(path, "llama", type="f32", random=True, seed=seed, template=template, n_layer=2)

    one = made("one")
    strange = folder / "strange.gguf"
    raw = one.read_bytes().replace(b"llama.", b"amall.")
    at = raw.index(b"llama", raw.index(b"general.architecture"))
    strange.write_bytes(raw[:at] + b"amall" + raw[at + 5 :])
    adapter = folder / "adapter.gguf"
    write_adapter(adapter, one, ("blk.0.attn_q.weight", "blk.1.ffn_down.weight"), size=2.0)
    return {
        "one": one,
        "two": made("two", seed=1),
        "thinks": made("thinks", template=f"{TEMPLATE}<think>\n"),
        "fails": made("fails", template="{{ raise_exception('only odd turns') }}"),
        "strange": strange,
        "adapter": adapter,
    }


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FOUNDRY_", "OPENAI_"))}
    own = {"FOUNDRY_HOME": str(tmp_path / "home"), "FOUNDRY_NO_TUNE": "1", "PYTHONPATH": str(PROJECT_ROOT)}
    return {**clean, "GOMP_SPINCOUNT": "100", "TERM": "dumb", **own}


def chat(environment: dict[str, str], *arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    return runtime(environment, "chat", *arguments, given=given, errors="replace")


@contextmanager
def running(environment: dict[str, str], *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A chat that goes on; killed at the end if it still runs."""
    child = subprocess.Popen(
        [sys.executable, "-m", "runtime", "chat", *map(str, arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def type_in(child: subprocess.Popen[bytes], text: str) -> None:
    assert child.stdin is not None
    child.stdin.write(text.encode())


def wait_for_line(child: subprocess.Popen[bytes], pattern: str) -> str:
    """Read stderr until a line matches; the line."""
    assert child.stderr is not None
    for raw in iter(child.stderr.readline, b""):
        if re.search(pattern, line := raw.decode("utf-8", "replace")):
            return line
    raise AssertionError(f"the child ended before {pattern!r} showed")


def talk_of(environment: dict[str, str], name: str) -> Conversation:
    return Conversation.load(Path(environment["FOUNDRY_HOME"]) / "sessions" / name / "talk.yaml")


def figures(done: subprocess.CompletedProcess[str]) -> list[int]:
    """Of each reply, how many prompt tokens were cached."""
    return [int(count) for count in re.findall(r"\((\d+) cached\)", done.stderr)]


def test_reply_follows_the_schema_also_when_one_is_set_or_taken_away_in_the_chat(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    lines = f"well?\n/params json_schema='{YES_OR_NO}' max_tokens=100\nand now?\n/params json_schema=\nwell?\n"
    done = chat(environment, models["one"], *GREEDY, "--no-stats", given=lines)
    assert done.returncode == 0, done.stderr
    found = re.findall(r'\{\s*"ok"\s*:\s*(?:true|false)\s*\}', done.stdout)
    assert len(found) == 1
    done = chat(environment, models["one"], *GREEDY, "-n", 100, "--json-schema", YES_OR_NO, given="well?\n")
    assert set(json.loads(done.stdout)) == {"ok"}


def test_thinking_is_split_off_and_shown_only_when_asked(environment: dict[str, str], models: dict[str, Path]) -> None:
    grammar = 'root ::= "<think>hm</think>\\n\\nwell"'
    arguments = (models["one"], "--temp", 0, "--n-ctx", 512, "--grammar", grammar, "--no-stats")
    done = chat(environment, *arguments, "--session", "s", given="1+1?\n")
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
    assert talk_of(environment, "s").messages[-1] == {"role": "assistant", "content": "well"}
    shown = chat(environment, *arguments, "--show-reasoning", given="1+1?\n")
    assert shown.stdout == "<think>hm\n</think>\nwell\n"


def test_model_whose_template_opens_the_thinking_begins_inside(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    done = chat(environment, models["thinks"], *GREEDY, given="1+1?\n")
    assert done.stdout == "\n"
    assert "no answer came: 12 tokens are the limit" in done.stderr
    assert "cut at the token limit" in done.stderr
    answer = chat(environment, models["thinks"], *GREEDY, "-n", 100, "--json-schema", YES_OR_NO, given="1+1?\n")
    assert set(json.loads(answer.stdout)) == {"ok"}


def test_session_resumes_with_its_turns_and_without_reading_them_again(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    session = (models["one"], *GREEDY, "--session", "work")
    first = chat(environment, *session, "--system", "Be brief.", given="one\ntwo\n")
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("session work: new\n")
    folder = Path(environment["FOUNDRY_HOME"]) / "sessions" / "work"
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.glob("[!l]*")} == {
        "talk.yaml": 0o600,
        "state.bin": 0o600,
    }
    second = chat(environment, *session, given="three\n")
    assert re.match(r"session work: 2 turns, restored in \d+\.\d s\n", second.stderr)
    assert figures(second)[0] > figures(first)[-1] > 0
    whole = chat(environment, *session[:-2], "--system", "Be brief.", given="one\ntwo\nthree\n")
    assert whole.stdout == first.stdout + second.stdout
    assert len(talk_of(environment, "work").turns()) == 3


@pytest.mark.parametrize("change", ["model", "adapter", "damage", "cut", "gone"])
def test_state_that_does_not_go_with_the_model_is_told_and_the_talk_resumes(
    environment: dict[str, str], models: dict[str, Path], change: str
) -> None:
    chat(environment, models["one"], *GREEDY, "--session", "work", given="one\n")
    state = Path(environment["FOUNDRY_HOME"]) / "sessions" / "work" / "state.bin"
    raw = state.read_bytes()
    if change == "damage":
        state.write_bytes(raw[:2000] + bytes([raw[2000] ^ 1]) + raw[2001:])
    elif change == "cut":
        state.write_bytes(raw[: len(raw) // 2])
    elif change == "gone":
        state.unlink()
    model = models["two"] if change == "model" else models["one"]
    more = ("--lora", models["adapter"]) if change == "adapter" else ()
    done = chat(environment, model, *more, *GREEDY, "--session", "work", given="two\n")
    assert done.returncode == 0, done.stderr
    assert "session work: 1 turn\n" in done.stderr
    assert ("what was said is read anew" in done.stderr) == (change != "gone")
    assert figures(done) == [0]
    assert len(talk_of(environment, "work").turns()) == 2
    again = chat(environment, model, *more, *GREEDY, "--session", "work", given="three\n")
    assert "2 turns, restored" in again.stderr


def test_second_chat_in_a_session_is_refused_before_the_model_is_loaded(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    session = (models["one"], *GREEDY, "--session", "work")
    with running(environment, *session) as child:
        type_in(child, "one\n")
        wait_for_line(child, "t/s generation")
        refused = chat(environment, models["one"].with_name("none.gguf"), "--session", "work", given="two\n")
        assert refused.returncode == 2
        assert "somebody talks in the session work already" in refused.stderr
        assert str(child.pid) in refused.stderr
    assert len(talk_of(environment, "work").turns()) == 1


def test_kill_leaves_the_last_whole_turn(environment: dict[str, str], models: dict[str, Path]) -> None:
    session = (models["one"], *GREEDY, "-n", 400, "--session", "work")
    for number in range(1, 4):
        with running(environment, *session) as child:
            type_in(child, f"question {number}\n")
            wait_for_line(child, "t/s generation")
            type_in(child, "never kept\n")
            assert child.stdout is not None
            child.stdout.read(1)
            child.kill()
            child.wait()
        kept = talk_of(environment, "work")
        asked = [message["content"] for message in kept.messages if message["role"] == "user"]
        assert [text for text in asked if text != "never kept"] == [f"question {n + 1}" for n in range(number)]
        assert kept.messages[-1]["role"] == "assistant"


def test_interrupted_reply_is_kept_as_far_as_it_came(environment: dict[str, str], models: dict[str, Path]) -> None:
    long = (models["one"], "--temp", "0", "--n-ctx", "32768", "--session", "work", "--logit-bias", "2=-inf")
    with running(environment, *long) as child:
        type_in(child, "go on\n")
        assert child.stdout is not None
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE_S)
        assert child.returncode == 130, err
        assert b"stopped" in err
    assert talk_of(environment, "work").messages[-1]["role"] == "assistant"


def test_another_model_answers_on_and_one_that_cannot_leaves_the_old_one(
    environment: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = (
        f"one\n/model {models['two']}\ntwo\n/model {models['one'].with_name('oen.gguf')}\nthree\n"
        f"/model {models['strange']}\nfour\n/model {models['one']} n_ctx=256\n/model\nfive\n/save {saved}\n"
    )
    done = chat(environment, models["one"], *GREEDY, given=lines)
    assert done.returncode == 2
    assert "two.gguf, 512 tokens of context; the conversation stays" in done.stderr
    assert "did you mean one.gguf?" in done.stderr
    assert "strange.gguf was not loaded: loading two.gguf again" in done.stderr
    assert done.stderr.count("one.gguf, 256 tokens of context") == 2
    assert len(json.loads(saved.read_text())) == 10
    assert len(figures(done)) == 5


def test_chat_goes_on_when_neither_the_new_model_nor_the_old_one_can_be_loaded(
    environment: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    passing = tmp_path / "passing.gguf"
    passing.write_bytes(models["one"].read_bytes())
    with running(environment, passing, *GREEDY, "--session", "work") as child:
        type_in(child, "one\n")
        wait_for_line(child, "t/s generation")
        passing.unlink()
        type_in(child, f"/model {models['strange']}\nhello\n")
        wait_for_line(child, "loading passing.gguf again")
        wait_for_line(child, "no model is loaded")
        type_in(child, f"/model {models['two']}\ntwo\n")
        wait_for_line(child, "t/s generation")
    assert len(talk_of(environment, "work").turns()) == 2


def test_adapters_are_added_scaled_and_removed_without_a_reload(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    adapter = models["adapter"]
    say = "hello\n/undo\n"
    lines = f"/lora\n{say}/lora {adapter}\n{say}/lora adapter.gguf=0\n{say}/lora -adapter.gguf\n{say}/lora -x.gguf\n"
    done = chat(environment, models["one"], *GREEDY, given=lines)
    replies = done.stdout.split("\n")
    assert done.returncode == 2
    assert f"{adapter} at 1" in done.stderr
    assert f"{adapter} at 0" in done.stderr
    assert done.stderr.count("no adapters") == 2
    assert "no adapter x.gguf is at work" in done.stderr
    whole = done.stdout
    plain = chat(environment, models["one"], *GREEDY, given="hello\n").stdout
    adapted = chat(environment, models["one"], *GREEDY, "--lora", adapter, given="hello\n").stdout
    assert plain != adapted
    assert whole == plain + adapted + plain + plain, replies


def test_adapter_of_another_model_is_refused_and_the_chat_goes_on(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    done = chat(environment, models["one"], *GREEDY, given=f"/lora {models['two']}\nhello\n")
    assert done.returncode == 2
    assert "is not a LoRA adapter" in done.stderr
    assert len(figures(done)) == 1


def test_plan_shows_settings_and_memory_as_the_verb_does(environment: dict[str, str], models: dict[str, Path]) -> None:
    done = chat(environment, models["one"], *GREEDY, given="/plan\n")
    assert done.returncode == 0
    assert re.search(r"^n_ctx\s+512\s+flag", done.stderr, re.MULTILINE)
    assert re.search(r"^n_threads\s+2\s+flag", done.stderr, re.MULTILINE)
    assert re.search(r"\[[wkcma]+[m.]*\]  .* of .* free", done.stderr)
    assert "t/s for generation" in done.stderr


def test_template_that_fails_is_told_in_its_words_and_keeps_no_turn(
    environment: dict[str, str], models: dict[str, Path]
) -> None:
    done = chat(environment, models["fails"], *GREEDY, "--session", "work", given="hello\n/session\n")
    assert done.returncode == 6
    assert "only odd turns" in done.stderr
    assert "session work: 0 turns" in done.stderr


def test_model_that_does_not_see_refuses_an_image(environment: dict[str, str], models: dict[str, Path]) -> None:
    done = chat(environment, models["one"], *GREEDY, given="/image a.png what is it?\n")
    assert done.returncode == 2
    assert "one.gguf does not see" in done.stderr


@pytest.fixture(scope="module")
def sighted(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its vision part and two pictures beside it."""
    folder = tmp_path_factory.mktemp("sighted")
    write_mmproj(folder / "mmproj-sighted.gguf", 64)
    for name in ("cat", "dog"):
        (folder / f"{name}.png").write_bytes(picture(name))
    return write_text_model(folder / "sighted.gguf", template=TEMPLATE)


def test_model_that_sees_answers_to_images_and_goes_on_from_them(environment: dict[str, str], sighted: Path) -> None:
    cat, dog = sighted.with_name("cat.png"), sighted.with_name("dog.png")
    session = (sighted, *GREEDY, "--session", "work")
    first = chat(environment, *session, given=f"/image {cat} what is it?\nand now?\n")
    assert first.returncode == 0, first.stderr
    cached = figures(first)
    assert cached[0] == 0
    assert cached[1] > N_TOKENS
    second = chat(environment, *session, given=f"/image {dog}\nand this?\n")
    assert second.returncode == 0, second.stderr
    assert "2 turns, restored" in second.stderr
    assert figures(second)[0] > cached[1]
    kinds = [
        [part["type"] for part in message["content"]]
        for message in talk_of(environment, "work").messages
        if isinstance(message["content"], list)
    ]
    assert kinds == [["image_url", "text"]] * 2
    other = chat(environment, sighted, *GREEDY, given=f"/image {dog} what is it?\n")
    assert other.stdout != first.stdout[: len(other.stdout)]


def test_images_of_a_session_are_left_out_for_a_model_that_does_not_see(
    environment: dict[str, str], sighted: Path, models: dict[str, Path]
) -> None:
    cat = sighted.with_name("cat.png")
    chat(environment, sighted, *GREEDY, "--session", "work", given=f"/image {cat} what is it?\n")
    done = chat(environment, models["one"], *GREEDY, "--session", "work", given="and now?\nand then?\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("one.gguf does not see: the conversation's images are left out") == 1


def test_old_images_are_dropped_with_their_turns(environment: dict[str, str], sighted: Path) -> None:
    lines = "".join(f"/image {sighted.with_name(name)}.png what is it?\n" for name in ("cat", "dog", "cat", "dog"))
    done = chat(environment, sighted, *GREEDY, "--n-ctx", "160", given=lines)
    assert done.returncode == 0, done.stderr
    assert "left out of the prompt" in done.stderr
    assert len(figures(done)) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no model named"),
        (("m.gguf", "--endpoint", "http://127.0.0.1:1/v1"), "both say what answers"),
        (("--n-ctx", "512", "--endpoint", "http://127.0.0.1:1/v1"), "--n-ctx is for a model in this process"),
        (("--lora", "a.gguf", "--endpoint", "http://127.0.0.1:1/v1"), "--lora is for a model in this process"),
        (("m.gguf", "--endpoint-model", "x"), "--endpoint-model without --endpoint"),
        (("m.gguf", "--session", "../x"), "no name for a session"),
        (("m.gguf", "--json-schema", "{"), "no JSON"),
        (("m.gguf", "--json-schema", "{}", "--grammar", "x"), "both say"),
    ],
)
def test_wrong_arguments_are_usage_errors(environment: dict[str, str], arguments: tuple[str, ...], words: str) -> None:
    done = chat(environment, *arguments, given="hello\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert not (Path(environment["FOUNDRY_HOME"]) / "sessions").exists()
