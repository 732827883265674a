"""Generation on the demo model: sampling, grammars, probabilities, speculation, several replies at once."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.engine import Engine, draw, load
from runtime.engine.json_schema import json_schema_to_gbnf
from runtime.engine.reply import Chunk, ReplyStats
from runtime.engine.sampling import SamplingOptions
from runtime.engine.speculate import Purse
from runtime.interrupts import Interrupt
from runtime.settings import settle
from toolchain.base import machine
from toolchain.base.errors import MemoryFitError, UsageError
from toolchain.base.files import PROJECT_ROOT

PROMPT = "The class statement"
LONG = "The import statement binds a name in the local namespace, and the class statement makes a class. " * 3
GREEDY = SamplingOptions(temp=0)
WILD = {"temp": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module")
def engine(demo_gguf: Path) -> Iterator[Engine]:
    settings = settle(machine=machine.probe(), n_ctx_train=512, flags={"n_ctx": "512"})
    with load(demo_gguf, settings) as loaded:
        yield loaded


def reply(engine: Engine, sampling: SamplingOptions, prompt: str = PROMPT, **options: Any) -> tuple[str, ReplyStats]:
    chunks = list(engine.stream(engine.tokenize(prompt), sampling, **{"max_tokens": 40, **options}))
    stats = chunks[-1].stats
    assert stats is not None
    return "".join(chunk.text for chunk in chunks), stats


def held(engine: Engine) -> int:
    """Tokens that the library's cache holds of the first sequence."""
    lib = engine.model.lib
    return int(lib.llama_memory_seq_pos_max(lib.llama_get_memory(engine.context.handle), 0)) + 1


# Sampling


def test_seed_reproduces_from_an_empty_cache_and_from_a_full_one(engine: Engine) -> None:
    seeded = SamplingOptions(seed=7)
    engine.context.clear()
    cold, _ = reply(engine, seeded, LONG)
    warm, stats = reply(engine, seeded, LONG)
    reply(engine, seeded, "Something else")
    assert cold == warm == reply(engine, seeded, LONG)[0]
    assert stats.cached_tokens > 0
    assert reply(engine, SamplingOptions(seed=8), LONG)[0] != cold


@pytest.mark.parametrize(
    "options",
    [
        {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.2, "repeat_last_n": 20},
        {"dry_multiplier": 0.8, "dry_sequence_breakers": ("\n",)},
        {"top_nsigma": 1.0},
        {"typical": 0.5, "temp": 0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"temp": 1.2, "dynatemp_range": 0.7, "dynatemp_exp": 2.0},
        {"mirostat": 1, "mirostat_ent": 3.0},
        {"mirostat": 2, "mirostat_lr": 0.2},
        {"temp": 0, "repeat_penalty": 1.5},
    ],
)
def test_each_sampler_changes_the_text_and_reproduces(engine: Engine, options: dict[str, Any]) -> None:
    plain = SamplingOptions(**{"seed": 3, **{key: options[key] for key in options if key == "temp"}})
    changed = SamplingOptions(**{"seed": 3, **options})
    assert reply(engine, plain)[0] != reply(engine, changed)[0] == reply(engine, changed)[0]


@pytest.mark.parametrize("options", [{"temp": 0}, {"seed": 5}, {"seed": 5, "top_k": 3}, {"seed": 5, "top_k": 900}])
def test_large_vocabularies_are_drawn_from_as_small_ones(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    by_the_library = reply(engine, SamplingOptions(**options))[0]
    monkeypatch.setattr(draw, "LARGE_FOR_BEST", 1)
    monkeypatch.setattr(draw, "LARGE_FOR_TOP_K", 1)
    assert reply(engine, SamplingOptions(**options))[0] == by_the_library


def test_banned_token_does_not_come_and_a_favoured_one_does(engine: Engine) -> None:
    first = next(chunk.token for chunk in tokens_of(engine, GREEDY) if chunk.token)
    banned = SamplingOptions(temp=0, logit_bias={first.token: -math.inf})
    assert first.token not in [chunk.token.token for chunk in tokens_of(engine, banned) if chunk.token]
    favoured = SamplingOptions(seed=1, logit_bias={first.token: 100.0})
    assert {chunk.token.token for chunk in tokens_of(engine, favoured) if chunk.token} == {first.token}


def test_bias_of_a_token_that_the_model_does_not_have_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="token 4096"):
        reply(engine, SamplingOptions(logit_bias={4096: 1.0}))


# Probabilities


def tokens_of(engine: Engine, sampling: SamplingOptions, **options: Any) -> list[Chunk]:
    return list(engine.stream(engine.tokenize(PROMPT), sampling, **{"max_tokens": 12, "top_logprobs": 5, **options}))


def test_probabilities_are_the_models_and_not_the_samplers(engine: Engine) -> None:
    greedy = [chunk.token for chunk in tokens_of(engine, GREEDY) if chunk.token]
    assert len(greedy) == 12
    assert all(each.token == each.top[0].token and each.logprob == each.top[0].logprob for each in greedy)
    assert all(list(each.top) == sorted(each.top, key=lambda top: -top.logprob) for each in greedy)
    every = tokens_of(engine, SamplingOptions(seed=2, temp=0.1, top_k=1), top_logprobs=engine.model.n_vocab)[0].token
    assert every is not None
    assert every[:3] == greedy[0][:3]
    assert sum(math.exp(top.logprob) for top in every.top) == pytest.approx(1, abs=1e-4)


def test_each_token_has_its_chunk_and_the_text_is_the_same(engine: Engine) -> None:
    chunks = tokens_of(engine, SamplingOptions(seed=4, **WILD), max_tokens=60)
    text, stats = reply(engine, SamplingOptions(seed=4, **WILD), max_tokens=60)
    assert "".join(chunk.text for chunk in chunks) == text
    pieces = [chunk.token.piece for chunk in chunks if chunk.token]
    assert b"".join(pieces).decode("utf-8", "replace") == text
    assert len(pieces) == stats.completion_tokens


def test_logits_may_be_changed_before_a_token_is_drawn(engine: Engine) -> None:
    wanted = engine.tokenize("ab")[-1]

    def only(logits: Any) -> None:
        logits[np.arange(len(logits)) != wanted] = -1e9

    chunks = tokens_of(engine, SamplingOptions(seed=1), adjust=only)
    figures = [chunk.token for chunk in chunks if chunk.token]
    assert {each.token for each in figures} == {wanted}
    assert figures[0].top[0].token != wanted  # the probabilities are those of before


# Grammars

SCHEMAS: dict[str, tuple[Any, Any]] = {
    "enum": (
        {"enum": ["a", 'b\n"\\', 3, None, [1, {"x": True}]]},
        lambda v: v in ["a", 'b\n"\\', 3, None, [1, {"x": True}]],
    ),
    "object": (
        {
            "type": "object",
            "properties": {
                "n": {"type": "integer", "minimum": -3, "maximum": 120},
                "o": {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
                "maybe": {"type": "null"},
            },
            "required": ["n", "o"],
        },
        lambda v: -3 <= v["n"] <= 120 and isinstance(v["o"]["b"], bool) and v.keys() <= {"n", "o", "maybe"},
    ),
    "array": (
        {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"const": "x"}]}, "minItems": 2, "maxItems": 4},
        lambda v: 2 <= len(v) <= 4 and all(isinstance(each, int) or each == "x" for each in v),
    ),
    "recursive": (
        {
            "$defs": {
                "n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}
            },
            "$ref": "#/$defs/n",
        },
        lambda v: v.keys() <= {"next"},
    ),
    "string": ({"type": "string", "minLength": 2, "maxLength": 6}, lambda v: 2 <= len(v) <= 6),
    "date": ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v)),
    "uuid": ({"type": "string", "format": "uuid"}, uuid.UUID),
    "pattern": (
        {"type": "string", "pattern": r'^([a-c]{2,4}|"\\)-\d+$'},
        lambda v: re.fullmatch(r'([a-c]{2,4}|"\\)-\d+', v),
    ),
    "types": ({"type": ["integer", "null"], "minimum": 0}, lambda v: v is None or v >= 0),
    "all of": (
        {
            "allOf": [
                {"properties": {"a": {"const": 1}}, "required": ["a"]},
                {"properties": {"b": {"const": 2}}, "required": ["b"]},
            ]
        },
        lambda v: v == {"a": 1, "b": 2},
    ),
    "anything": ({}, lambda _: True),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_schema_promises_comes_even_from_wild_sampling(engine: Engine, name: str) -> None:
    schema, holds = SCHEMAS[name]
    grammar = json_schema_to_gbnf(json.dumps(schema))
    ended = 0
    for seed in range(12):
        text, stats = reply(engine, SamplingOptions(seed=seed, grammar=grammar, **WILD), max_tokens=200)
        if stats.finish_reason == "stop":
            ended += 1
            assert holds(json.loads(text)), text
    assert ended


def test_reply_that_is_cut_inside_its_json_says_so(engine: Engine) -> None:
    grammar = json_schema_to_gbnf(
        '{"type": "array", "items": {"const": "long enough"}, "minItems": 20, "maxItems": 20}'
    )
    text, stats = reply(engine, SamplingOptions(grammar=grammar), max_tokens=20)
    assert (stats.finish_reason, text[:1]) == ("length", "[")


def test_grammar_decides_where_the_reply_ends(engine: Engine) -> None:
    assert reply(engine, SamplingOptions(seed=1, grammar='root ::= "def f():\\n    return \\"Zoë 🦙\\"\\n"'))[0] == (
        'def f():\n    return "Zoë 🦙"\n'
    )


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        ('root ::= "a"\nb ::= (\n"c"', "line 3"),
        ('root ::= "a" thing\n', "line 1: Undefined rule identifier 'thing'"),
        ('x ::= "a"\nroot := x', "line 2: expecting ::="),
        ('top ::= "a"', "'root'"),
        ('root ::= root "a"', "left recursion"),
    ],
)
def test_broken_grammar_is_refused_with_its_line(
    engine: Engine, capfd: pytest.CaptureFixture[str], grammar: str, told: str
) -> None:
    with pytest.raises(UsageError) as caught:
        reply(engine, SamplingOptions(grammar=grammar))
    assert told in (caught.value.evidence or "")
    assert capfd.readouterr() == ("", "")


def test_grammar_and_ban_that_leave_nothing_are_an_error(engine: Engine) -> None:
    bans = {token: -math.inf for token in range(engine.model.n_vocab) if b"x" in engine.model.piece(token)}
    with pytest.raises(UsageError, match="no token is left"):
        reply(engine, SamplingOptions(grammar='root ::= "x"', logit_bias=bans))


# Where a reply is left


def test_reader_that_leaves_early_leaves_a_cache_that_is_right(engine: Engine) -> None:
    whole, _ = reply(engine, GREEDY)
    for lookup in (False, True):
        chunks = engine.stream(engine.tokenize(PROMPT), GREEDY, lookup=lookup)
        for _ in range(5):
            next(chunks)
        chunks.close()
        assert held(engine) == len(engine.context.cached)
        assert reply(engine, GREEDY)[0] == whole


def test_another_thread_stops_the_reply(engine: Engine) -> None:
    interrupt = Interrupt()
    timer = threading.Timer(0.05, lambda: setattr(interrupt, "raised", True))
    timer.start()
    _, stats = reply(engine, SamplingOptions(seed=1), max_tokens=None, interrupt=interrupt)
    timer.join()
    assert stats.finish_reason in ("cancelled", "length")
    assert held(engine) == len(engine.context.cached)


@pytest.mark.parametrize("lookup", [False, True])
def test_reply_that_is_left_after_the_engine_was_closed_touches_nothing(demo_gguf: Path, lookup: bool) -> None:
    settings = settle(machine=machine.probe(), n_ctx_train=512, flags={"n_ctx": "256"})
    with load(demo_gguf, settings, sequences=2) as engine:
        one = engine.stream(engine.tokenize(LONG), GREEDY, lookup=lookup)
        next(one)
        context = engine.context
    one.close()
    assert (context.handle, context.keep(3)) == (None, 0)
    with load(demo_gguf, settings, sequences=2) as engine:
        several = engine.stream_many([engine.tokenize(PROMPT), engine.tokenize("A")], GREEDY, max_tokens=20)
        next(several)
    several.close()


def test_context_that_found_no_memory_twice_says_so_at_the_next_use(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settle(machine=machine.probe(), n_ctx_train=512, flags={"n_ctx": "256"})
    with load(demo_gguf, settings) as engine:
        tokens = engine.tokenize(PROMPT)
        told = b"failed to allocate buffer for kv cache\n"
        monkeypatch.setattr(engine.model.lib, "llama_init_from_model", lambda *_: engine.model.log.write(4, told))
        with pytest.raises(MemoryFitError, match="does not fit in memory"):
            list(engine.stream_many([tokens, tokens], GREEDY))
        for again in (engine.stream(tokens, GREEDY), engine.stream_many([tokens], GREEDY)):
            with pytest.raises(MemoryFitError, match="no context any more"):
                next(again)


# Speculation


def test_reply_that_repeats_the_prompt_is_drafted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Purse, "affords", lambda self, *_: self._single > 0)  # whatever else the machine does
    passage = np.random.default_rng(0).permutation(np.arange(300, 600))[:120].tolist()
    left = iter(passage)

    def copy(logits: Any) -> None:
        logits[next(left)] = 1000

    chunks = list(engine.stream(passage, GREEDY, max_tokens=120, lookup=True, adjust=copy, top_logprobs=0))
    stats = chunks[-1].stats
    assert [chunk.token.token for chunk in chunks if chunk.token] == passage
    assert stats is not None
    assert stats.accepted_tokens > 60
    assert engine.context.cached == [*passage, *passage[:-1]]
    assert held(engine) == 239


def test_wrong_drafts_change_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may be drafted is; up to the first close choice, which the arithmetic of a batch may turn."""
    prompt = engine.tokenize("one two three four one two three " * 8)
    options: dict[str, Any] = {"max_tokens": 80, "top_logprobs": 2}
    plain = [chunk.token for chunk in engine.stream(prompt, SamplingOptions(seed=3), **options) if chunk.token]
    monkeypatch.setattr(Purse, "affords", lambda self, *_: self._single > 0)
    chunks = list(engine.stream(prompt, SamplingOptions(seed=3), lookup=True, **options))
    guessed = [chunk.token for chunk in chunks if chunk.token]
    stats = chunks[-1].stats
    assert stats is not None
    assert stats.drafted_tokens > stats.accepted_tokens
    assert held(engine) == len(engine.context.cached)
    same = next((n for n, (a, b) in enumerate(zip(plain, guessed, strict=False)) if a.token != b.token), len(plain))
    assert same > 5
    assert all(abs(a.logprob - b.logprob) < 0.5 for a, b in zip(plain[:same], guessed[:same], strict=True))


# Several at once


def many(engine: Engine, prompts: list[str], sampling: Any, **options: Any) -> tuple[list[str], list[ReplyStats]]:
    texts, stats = [""] * len(prompts), dict[int, ReplyStats]()
    tokens = [engine.tokenize(prompt) for prompt in prompts]
    for index, chunk in engine.stream_many(tokens, sampling, **{"max_tokens": 24, **options}):
        texts[index] += chunk.text
        if chunk.stats:
            assert index not in stats
            stats[index] = chunk.stats
    return texts, [stats[index] for index in range(len(prompts))]


def test_each_of_many_replies_follows_its_own_rules(engine: Engine) -> None:
    """Nineteen for sixteen places: the last ones wait."""
    grammars = [SamplingOptions(seed=n, grammar=f'root ::= "reply number {n}"') for n in range(19)]
    texts, stats = many(engine, [f"{PROMPT} {n}" for n in range(19)], grammars)
    assert texts == [f"reply number {n}" for n in range(19)]
    assert {each.finish_reason for each in stats} == {"stop"}
    assert all(each.cached_tokens > 0 for each in stats)


def test_replies_together_are_those_alone(engine: Engine) -> None:
    """But where a close choice turns: the arithmetic of a batch differs in the last bits."""
    prompts = ["The class", "A function", "It is", "When the", "Objects are", "If a name"]
    ways = [SamplingOptions(temp=0) for _ in prompts]
    alone = [reply(engine, way, prompt, max_tokens=16)[0] for prompt, way in zip(prompts, ways, strict=True)]
    together, _ = many(engine, prompts, ways, max_tokens=16)
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 4


def test_many_replies_in_a_small_context_take_turns(engine: Engine) -> None:
    texts, stats = many(engine, [f"{PROMPT} {n}" for n in range(5)], SamplingOptions(seed=1), max_tokens=200)
    assert all(each.completion_tokens == 200 or each.finish_reason == "stop" for each in stats)
    assert all(texts)


def test_stop_string_ends_only_the_reply_that_has_it(engine: Engine) -> None:
    grammars = [SamplingOptions(grammar=f'root ::= "{text}"') for text in ("one STOP two", "one two three")]
    texts, _ = many(engine, [PROMPT, PROMPT], grammars, stops=["STOP"])
    assert texts == ["one ", "one two three"]


def test_replies_of_no_token_draw_none(engine: Engine) -> None:
    texts, stats = many(engine, [LONG, f"{LONG} and", PROMPT], GREEDY, max_tokens=0)
    assert texts == ["", "", ""]
    assert [(each.completion_tokens, each.finish_reason) for each in stats] == [(0, "length")] * 3
    assert all(each.cached_tokens + each.processed_tokens == each.prompt_tokens for each in stats)


def test_no_prompts_give_no_replies(engine: Engine) -> None:
    many(engine, ["A", "B"], GREEDY)
    assert list(engine.stream_many([], GREEDY)) == []


def test_interrupt_ends_all_of_them(engine: Engine) -> None:
    interrupt = Interrupt()
    finished = []
    tokens = [engine.tokenize(PROMPT)] * 20
    for _, chunk in engine.stream_many(tokens, SamplingOptions(seed=1), max_tokens=100, interrupt=interrupt):
        interrupt.raised = True
        if chunk.stats:
            finished.append(chunk.stats.finish_reason)
    assert finished == ["cancelled"] * 20


def test_one_reply_after_many_is_as_before(engine: Engine) -> None:
    before, _ = reply(engine, GREEDY)
    many(engine, ["A", "B"], GREEDY)
    assert reply(engine, GREEDY)[0] == before
    assert held(engine) == len(engine.context.cached)


# The command line


def command(model: Path, *arguments: object) -> tuple[list[str], dict[str, str]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    argv = [sys.executable, "-m", "runtime", "complete", model, *arguments]
    return [str(each) for each in argv], {**clean, "PYTHONPATH": str(PROJECT_ROOT), "TERM": "dumb"}


def complete(model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    argv, environment = command(model, *arguments)
    return subprocess.run(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("options", [("-p", PROMPT, "-p", "A function"), ("-p", LONG, "--lookup"), ("-p", PROMPT)])
def test_reader_of_the_pipe_who_goes_away_ends_the_verb_in_order(demo_gguf: Path, options: tuple[str, ...]) -> None:
    argv, environment = command(demo_gguf, "-n", 400, "--no-tune", *options)
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        told = process.stderr.read().decode()
        assert process.wait(120) == 0, told
    assert "Traceback" not in told


def test_schema_from_a_file_and_probabilities_on_the_command_line(demo_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}')
    done = complete(demo_gguf, "-p", "It is", "--json-schema", path, "--json", "--logprobs", 2, "--lookup")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads(found["text"])["colour"] in ("red", "blue")
    assert bytes(byte for each in found["logprobs"] for byte in each["bytes"]).decode() == found["text"]
    assert all(len(each["top"]) == 2 for each in found["logprobs"])


def test_several_prompts_give_several_replies_in_order(demo_gguf: Path) -> None:
    prompts = ("-p", "The class", "-p", "A function", "-p", "It is")
    options = (*prompts, "--grammar", 'root ::= "a" | "b\\n"', "--seed", 3)
    done = complete(demo_gguf, *options, "--json")
    assert done.returncode == 0, done.stderr
    replies = json.loads(done.stdout)["replies"]
    assert [each["finish_reason"] for each in replies] == ["stop"] * 3
    shown = complete(demo_gguf, *options).stdout
    assert shown == "\n".join(each["text"].removesuffix("\n") + "\n" for each in replies)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--logit-bias", "12"), "--logit-bias 12"),
        (("--logit-bias", "99999=1"), "token 99999"),
        (("--json-schema", "{"), "is no JSON"),
        (("--json-schema", "missing.json"), "there is no file"),
        (("--grammar", 'root ::= "a'), "grammar cannot be used"),
        (("--grammar", 'root ::= "a"', "--json-schema", "{}"), "--grammar and --json-schema"),
        (("--logprobs", "1"), "--json"),
        (("--mirostat", "3"), "--mirostat"),
        (("-p", "-", "-p", "-"), "standard input is read once"),
    ],
)
def test_option_that_makes_no_sense_is_told(demo_gguf: Path, arguments: tuple[str, ...], told: str) -> None:
    done = complete(demo_gguf, "-p", "It is", "-n", "1", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stdout == ""
