"""Files of examples become the tokens that the runtime feeds, and what is learned is the answer and its end."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from runtime import LLaMa
from runtime.engine.model import Model
from runtime.library_log import LibraryLog
from tests.front_door import json_without_processes, run
from tests.generated_models import FAMILIES, Family, write_model
from toolchain.base import files
from toolchain.base.chat_template import ChatTemplate, Message
from toolchain.base.errors import ArtifactError, FoundryError, UsageError
from toolchain.lora.data import vocabulary as vocabulary_module
from toolchain.lora.data.prepare import DataRequest, Prepared, prepare_data
from toolchain.lora.data.records import MAX_RUN, DataFile, Kind
from toolchain.lora.data.render import render
from toolchain.lora.data.vocabulary import Vocabulary, import_library
from toolchain.lora.dataset_file import IGNORED, PROBE_TOKENS, Rows, read_dataset

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _own_stack_limit() -> Iterator[None]:
    """The library is loaded as the child loads it, with a deep stack; children of later tests must not inherit it."""
    before = resource.getrlimit(resource.RLIMIT_STACK)
    yield
    resource.setrlimit(resource.RLIMIT_STACK, before)


def said(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation that the user begins."""
    turns = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


TALKS = [
    said("Hi there", "Hello. How are you?"),
    said("What is 1+1?", "2", "And  doubled?\n", "4!\n\n```python\n    print(2 + 2)\n```"),
    said(
        "Und auf Deutsch?",
        "Gr\u00fc\u00dfe \U0001f389",
        "\u65e5\u672c\u8a9e",
        "\u306f\u3044",
        "ok",
        " spaced out ",
        system="Be brief.",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _own_home(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What loads teach goes to a home of the tests, which borrows the toolchain; the models are made before."""
    home = tmp_path_factory.mktemp("home")
    for borrowed in ("toolchains", "sources"):
        (home / borrowed).symlink_to(files.foundry_home() / borrowed)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FOUNDRY_")]:
            patch.delenv(name)
        patch.setenv("FOUNDRY_HOME", str(home))
        patch.setenv("FOUNDRY_NO_TUNE", "1")
        yield


def jsonl(path: Path, talks: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def request(base: Path, source: Path, kind: Kind = "chat", **changes: Any) -> DataRequest:
    plain = DataRequest(
        base=str(base),
        sources=(DataFile(path=str(source), kind=kind),),
        held_out=0.0,
        held_out_file=None,
        n_ctx=512,
        packing=True,
        learn_prompts=False,
        seed=1,
        n_threads=2,
    )
    return replace(plain, **changes)


def prepared(asked: DataRequest, folder: Path) -> Prepared:
    return prepare_data(asked, folder, log=folder.with_name("log"))


def failure(asked: DataRequest, folder: Path) -> FoundryError:
    """What preparing ends with; it leaves nothing behind."""
    with pytest.raises(FoundryError) as caught:
        prepared(asked, folder)
    assert not folder.exists()
    assert not list(folder.parent.glob(".partial-*"))
    assert caught.value.hint
    return caught.value


def examples(rows: Rows) -> list[tuple[list[int], list[bool]]]:
    """(tokens, which are learned) of each example, without those that nobody learns."""
    found = []
    for ids, labels, positions in zip(rows.ids, rows.labels, rows.positions, strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            learned = labels[start:end] != IGNORED
            if learned.any():
                assert (labels[start:end][learned] == ids[start:end][learned]).all()
                found.append((ids[start:end].tolist(), learned.tolist()))
    return found


def learned_runs(example: tuple[list[int], list[bool]]) -> list[tuple[list[int], list[int]]]:
    """(all tokens before, learned tokens) of each run of learned tokens."""
    ids, learned = example
    runs, start = [], 0
    for counts, group in itertools.groupby(learned):
        end = start + len(list(group))
        if counts:
            runs.append((ids[:start], ids[start:end]))
        start = end
    return runs


def model_of(kind: str, demo: Path, folder: Path) -> Path:
    if kind == "demo":
        return demo
    template = CHATML if kind == "qwen3" else ""
    return write_model(folder / f"{kind}.gguf", "qwen3" if kind == "qwen3" else "llama", random=True, template=template)


@pytest.mark.parametrize("kind", ["demo", "qwen3", "without-template"])
def test_prompts_are_the_runtimes_tokens_and_the_answer_with_its_end_is_learned(
    kind: str, demo_gguf: Path, tmp_path: Path
) -> None:
    base = model_of(kind, demo_gguf, tmp_path)
    made = prepared(request(base, jsonl(tmp_path / "talks.jsonl", TALKS)), tmp_path / "out")
    runs = [run for example in examples(read_dataset(made.dataset).train) for run in learned_runs(example)]
    with LLaMa(base) as llm:
        wanted = [
            (
                llm.tokenize(llm.build_prompt(talk[:turn], max_tokens=8), add_bos=True),
                talk[turn]["content"],
                turn == len(talk) - 1,
            )
            for talk in TALKS
            for turn in range(len(talk))
            if talk[turn]["role"] == "assistant"
        ]
        assert len(runs) == len(wanted)
        for prompt, answer, last in wanted:
            (learned,) = [tokens for before, tokens in runs if before == prompt]
            text = llm.detokenize(learned).replace("\u2581", " ")  # the generated vocabulary has no space of its own
            ending = {"demo": "</s>", "qwen3": "<|end|></s>" if last else "<|end|>"}.get(kind, "</s>" if last else "")
            lead = " " if kind == "without-template" else ""  # what stands between "Assistant:" and its words
            assert text in (f"{lead}{answer}{ending}", f"{lead}{answer.strip()}{ending}")
    assert made.facts.has_template == (kind != "without-template")
    assert made.facts.learned_tokens == sum(len(tokens) for _, tokens in runs)


def test_all_turns_are_learned_when_prompts_are(demo_gguf: Path, tmp_path: Path) -> None:
    asked = request(demo_gguf, jsonl(tmp_path / "talks.jsonl", TALKS), learn_prompts=True)
    made = prepared(asked, tmp_path / "out")
    found = examples(read_dataset(made.dataset).train)
    assert len(found) == made.facts.examples == len(TALKS)
    assert all(learned == [False] + [True] * (len(ids) - 1) for ids, learned in found)
    with LLaMa(demo_gguf) as llm:
        texts = sorted(llm.detokenize(ids) for ids, _ in found)
    assert all(turn["content"].strip() in "".join(texts) for talk in TALKS for turn in talk)


def test_a_text_is_learned_whole_behind_its_first_token(demo_gguf: Path, tmp_path: Path) -> None:
    text = inspect.getsource(argparse)[:20_000]
    (tmp_path / "a.txt").write_text(text)
    made = prepared(request(demo_gguf, tmp_path / "a.txt", "text", packing=False, n_ctx=128), tmp_path / "out")
    with LLaMa(demo_gguf) as llm:
        tokens = llm.tokenize(text, add_bos=True)
    windows = [tokens[at : at + 128] for at in range(0, len(tokens), 128)]
    found = examples(read_dataset(made.dataset).train)
    assert sorted(ids for ids, _ in found) == sorted(windows)
    assert made.facts.learned_tokens == len(tokens) - len(windows)
    assert made.train_text.read_text() == text + ("" if text.endswith("\n") else "\n")


def test_the_probe_is_what_the_runtime_computes(demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(inspect.getsource(argparse)[:5_000])
    dataset = read_dataset(prepared(request(demo_gguf, tmp_path / "a.txt", "text"), tmp_path / "out").dataset)
    assert len(dataset.probe_ids) == PROBE_TOKENS
    last = dataset.probe_logits[-1].astype(np.float64)
    logprobs = last - np.log(np.exp(last - last.max()).sum()) - last.max()
    with LLaMa(demo_gguf) as llm:
        text = llm.detokenize(dataset.probe_ids[1:].tolist())
        assert llm.tokenize(text, add_bos=True) == dataset.probe_ids.tolist()
        llm.create_native_completion(text, max_tokens=1, temperature=0, logprobs=1)
        assert llm.finish_meta is not None
        first = llm.finish_meta.logprobs[0]
    assert first.token == int(last.argmax())
    assert math.isclose(first.logprob, logprobs[first.token], abs_tol=0.05)  # f16 cache and repacked kernels there


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2moe"])  # that one computes NaN
def test_every_family_is_probed(family: Family, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", family, type="f32", random=True)
    (tmp_path / "a.txt").write_text(inspect.getsource(argparse)[:500])
    dataset = read_dataset(prepared(request(base, tmp_path / "a.txt", "text"), tmp_path / "out").dataset)
    assert dataset.probe_logits.shape == (PROBE_TOKENS, 512)
    assert np.isfinite(dataset.probe_logits).all()
    assert len(np.unique(dataset.probe_logits, axis=0)) > 1


def test_a_base_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", "llama", type="f32", random=True)
    norm = next(tensor for tensor in gguf.GGUFReader(base, "r+").tensors if tensor.name == "output_norm.weight")
    norm.data[:] = np.nan
    norm.data.flush()
    error = failure(request(base, jsonl(tmp_path / "a.jsonl", TALKS)), tmp_path / "out")
    assert isinstance(error, ArtifactError)
    assert "no numbers" in error.evidence


def test_the_same_request_makes_the_same_bytes_and_another_seed_other_ones(demo_gguf: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "talks.jsonl", TALKS * 10)
    asked = request(demo_gguf, source, held_out=0.3)
    one, two = (prepared(asked, tmp_path / name) for name in "ab")
    for name in ("dataset", "train_text", "held_text"):
        assert getattr(one, name).read_bytes() == getattr(two, name).read_bytes()
    other = prepared(replace(asked, seed=5), tmp_path / "c")
    assert one.dataset.read_bytes() != other.dataset.read_bytes()


def test_what_is_there_is_taken_without_a_process(demo_gguf: Path, tmp_path: Path) -> None:
    asked = request(demo_gguf, jsonl(tmp_path / "talks.jsonl", TALKS))
    made = prepared(asked, tmp_path / "out")
    answer = json_without_processes(
        "import json\nfrom toolchain.lora.data.prepare import *\nfrom toolchain.lora.data.records import DataFile\n"
        f"folder = Path({str(tmp_path / 'out')!r})\n"
        f"print(json.dumps(prepare_data({asked!r}, folder, log=folder).facts.__dict__))"
    )
    assert answer == made.facts.__dict__


def test_no_held_out_example_is_learned_however_often_it_is_there(demo_gguf: Path, tmp_path: Path) -> None:
    talks = [said(f"Question {n}?", f"Answer {n}.") for n in range(40)]
    spaced = [said(f"Question  {n}?\n", f" Answer {n}. ") for n in range(40)]
    source = jsonl(tmp_path / "talks.jsonl", [*talks, *spaced, *talks])
    asked = request(demo_gguf, source, held_out=0.25)
    sources = (replace(asked.sources[0], repeat=2), DataFile(path=str(source), kind="chat"))
    made = prepared(replace(asked, sources=sources), tmp_path / "out")
    numbers = [
        {line.split()[-1] for line in text.read_text().splitlines() if line.startswith("User:")}
        for text in (made.train_text, made.held_text)
    ]
    assert len(numbers[1]) == 10
    assert len(numbers[0]) == 30
    assert not numbers[0] & numbers[1]
    assert made.facts.examples == 30 * 3 * 3
    assert made.facts.held_examples == 10 * 3 * 2


def test_a_held_out_files_examples_are_left_out_of_what_is_learned(demo_gguf: Path, tmp_path: Path) -> None:
    talks = [said(f"Question {n}?", f"Answer {n}.") for n in range(20)]
    held = DataFile(path=str(jsonl(tmp_path / "held.jsonl", talks[15:] + TALKS)), kind="chat")
    made = prepared(
        request(demo_gguf, jsonl(tmp_path / "talks.jsonl", talks), held_out=0.5, held_out_file=held), tmp_path / "out"
    )
    assert (made.facts.examples, made.facts.leaked) == (15, 5)
    assert made.held_text.read_text().startswith("User: Question 15?\n")
    assert "Question 15?" not in made.train_text.read_text()


def test_a_held_out_text_that_is_learned_too_is_refused(demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First part.\n\nThe second part is kept.\n\nThird part.\n")
    (tmp_path / "held.txt").write_text("The second part is kept.\n")
    held = DataFile(path=str(tmp_path / "held.txt"), kind="text")
    error = failure(request(demo_gguf, tmp_path / "a.txt", "text", held_out_file=held), tmp_path / "out")
    assert isinstance(error, UsageError)
    assert "a.txt" in error.message


def test_pieces_of_a_text_are_held_out_and_not_learned(demo_gguf: Path, tmp_path: Path) -> None:
    lines = [f"Line {n} of a text with some words in it.\n" for n in range(5_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    made = prepared(request(demo_gguf, tmp_path / "a.txt", "text", held_out=0.2), tmp_path / "out")
    train, held = (text.read_text().splitlines(keepends=True) for text in (made.train_text, made.held_text))
    assert sorted([*train, *held], key=lines.index) == lines
    assert made.facts.held_tokens / (made.facts.tokens + made.facts.held_tokens) == pytest.approx(0.2, rel=0.1)


def test_a_row_too_short_for_any_answer_is_refused_with_one_that_is_not(demo_gguf: Path, tmp_path: Path) -> None:
    asked = request(demo_gguf, jsonl(tmp_path / "talks.jsonl", [said("word " * 300, "Yes.")]), n_ctx=64)
    error = failure(asked, tmp_path / "out")
    assert isinstance(error, UsageError)
    n_ctx = int(error.hint.split("n_ctx: ")[1].split("`")[0])
    made = prepared(replace(asked, n_ctx=n_ctx), tmp_path / "out")
    assert (made.facts.examples, made.facts.cut, made.facts.dropped) == (1, 0, 0)
    assert f"the longest of {made.facts.longest} tokens" in error.evidence


def test_long_answers_are_cut_and_counted(demo_gguf: Path, tmp_path: Path) -> None:
    talks = [said("Hi", "word " * 300), said("word " * 300, "Hi"), *TALKS]
    made = prepared(request(demo_gguf, jsonl(tmp_path / "talks.jsonl", talks), n_ctx=128), tmp_path / "out")
    assert (made.facts.cut, made.facts.dropped) == (1, 1)
    assert made.facts.longest > 300


def test_a_single_example_cannot_be_learned_and_held_out(demo_gguf: Path, tmp_path: Path) -> None:
    error = failure(request(demo_gguf, jsonl(tmp_path / "a.jsonl", TALKS[:1] * 3), held_out=0.1), tmp_path / "out")
    assert "too little data to judge" in error.message
    assert "held_out: 0" in error.hint


def test_conversations_that_the_template_refuses_are_named_with_its_words(tmp_path: Path) -> None:
    base = write_model(tmp_path / "strict.gguf", "llama", random=True, template=ALTERNATING)
    users = [{"role": "user", "content": "a"}, *said("b", "c")]
    tool = [*said("a"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "b"}]
    error = failure(request(base, jsonl(tmp_path / "a.jsonl", [*TALKS[:2], users, tool])), tmp_path / "out")
    assert isinstance(error, UsageError)
    first, second = error.evidence.splitlines()
    assert first.startswith("a.jsonl:3: ")
    assert "roles must alternate" in first
    assert second == "a.jsonl:4: the model's template takes no turns of a tool"


@pytest.mark.parametrize("template", ["{% for %}", "{{ 9 ** 9 ** 9 }}", "{{ raise_exception('never') }}"])
def test_a_template_that_takes_nothing_is_the_bases_fault(template: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "broken.gguf", "llama", template=template)
    error = failure(request(base, jsonl(tmp_path / "a.jsonl", TALKS)), tmp_path / "out")
    assert isinstance(error, ArtifactError)
    assert "chat template cannot be used" in error.message


def test_a_base_that_cannot_be_read_is_told_as_the_library_tells_it(demo_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_gguf.read_bytes()[:-100_000])
    assert isinstance(failure(request(cut, jsonl(tmp_path / "a.jsonl", TALKS)), tmp_path / "out"), ArtifactError)


def test_one_line_of_10_mb_is_learned_as_text(demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"word " * (2 << 20))
    facts = prepared(request(demo_gguf, tmp_path / "a.txt", "text", held_out=0.1), tmp_path / "out").facts
    assert facts.tokens + facts.held_tokens > 2 << 20
    assert facts.cut == facts.dropped == 0


# Real vocabularies and templates, as the pinned tree has them


def tree() -> Path:
    one = next(files.home_dir("sources").glob("sdist-*/vendor/llama.cpp/models/templates/Qwen-Qwen3-0.6B.jinja"))
    return one.parents[1]


VOCABULARIES = ("llama-spm", "llama-bpe", "qwen2", "gpt-2", "phi-3", "gemma-4", "deepseek-llm", "falcon", "command-r")


@contextmanager
def opened(name: str) -> Iterator[tuple[Vocabulary, Model]]:
    """A vocabulary of ours and the runtime's own, of the same file."""
    lib = import_library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    handle = lib.llama_model_load_from_file(os.fsencode(tree() / f"ggml-vocab-{name}.gguf"), params)
    model = Model(lib=lib, log=LibraryLog(shown=False), handle=handle)
    try:
        yield Vocabulary(lib, model.vocab, name), model
    finally:
        model.close()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tokens_are_the_runtimes_and_a_long_texts_parts_are_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = (tree() / f"ggml-vocab-{name}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    long = inspect.getsource(argparse) + "Gr\u00fc\u00dfe \U0001f389 \u00bd\n" * 200
    with opened(name) as (ours, runtimes):
        for text in (*texts, long, f"{runtimes.named_piece(1).decode()} {long[:500]}"):
            assert ours.tokens(text) == runtimes.tokenize(text)
        monkeypatch.setattr(vocabulary_module, "PIECE_BYTES", 2048)
        data = long.encode()
        parts = list(ours.document(data, (0, len(data))))
    assert len(parts) > len(data) / 2048
    assert np.concatenate(parts).tolist() == runtimes_tokens(name, long)


def runtimes_tokens(name: str, text: str) -> list[int]:
    with opened(name) as (_, model):
        return model.tokenize(text)


@pytest.mark.parametrize("name", ["deepseek-coder", "llama-bpe", "llama-spm"])
def test_the_longest_run_that_an_example_may_have_is_tokenized(name: str) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom toolchain.lora.data.vocabulary import *\nlib = import_library()\n"
        "with open_vocabulary(lib, Path(sys.argv[1])) as vocabulary:\n"
        f"    for sign in ('a', '\\u65e5', '=', ' '):\n        assert vocabulary.tokens(sign * {MAX_RUN})\n"
    )
    done = run([sys.executable, "-c", program, str(tree() / f"ggml-vocab-{name}.gguf")])
    assert done.returncode == 0, done.stderr


TEMPLATES = (
    *("Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "Qwen-QwQ-32B", "GLM-4.7-Flash", "LFM2-8B-A1B"),
    *("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama-cpp-deepseek-r1", "deepseek-ai-DeepSeek-V3.1"),
    *("meta-llama-Llama-3.2-3B-Instruct", "google-gemma-2-2b-it", "google-gemma-4-31B-it", "openai-gpt-oss-120b"),
    *("mistralai-Mistral-Nemo-Instruct-2407", "microsoft-Phi-3.5-mini-instruct", "HuggingFaceTB-SmolLM3-3B"),
    *("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "ibm-granite-granite-4.0", "Kimi-K2-Instruct"),
)
THOUGHTFUL = said("Why?", "<think>\nBecause of x.\n</think>\n\nBecause.", "Really?", "<think>\nHm.\n</think>\n\nYes.")


@pytest.mark.parametrize("talk", [TALKS[1], TALKS[2], THOUGHTFUL], ids=["plain", "system", "thoughts"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_follows_the_runtimes_prompt_and_ends(name: str, talk: list[Message]) -> None:
    with opened("qwen2") as (vocabulary, model):
        template = ChatTemplate(
            source=(tree() / "templates" / f"{name}.jinja").read_text(), bos_token="", eos_token="<|im_end|>"
        )
        rendered = render(talk, template, vocabulary, n_ctx=4096)
        runs = [run for each in rendered for run in learned_runs((each.ids, [bool(counts) for counts in each.learned]))]
        turns = [turn for turn, message in enumerate(talk) if message["role"] == "assistant"]
        assert len(runs) == len(turns)
        for turn, (before, learned) in zip(turns, runs, strict=True):
            assert before == model.tokenize(template.render(talk[:turn], ask=True))
            words = talk[turn]["content"].split("</think>")[-1].strip()
            text = model.detokenize(learned)
            assert text.split("</think>")[-1].strip().startswith(words) or words in text
        assert all(vocabulary.ends_reply(each.ids[-1]) and each.learned[-1] for each in rendered)


@pytest.mark.parametrize(
    ("vocab", "name"),
    [
        *(("llama-bpe", "meta-llama-Llama-3.2-3B-Instruct"), ("llama-spm", "mistralai-Mistral-Nemo-Instruct-2407")),
        *(("gemma-4", "google-gemma-2-2b-it"), ("llama-spm", "microsoft-Phi-3.5-mini-instruct")),
    ],
)
def test_every_example_begins_with_the_first_token_that_the_model_wants_once(vocab: str, name: str) -> None:
    with opened(vocab) as (vocabulary, model):
        bos = model.lib.llama_vocab_bos(model.vocab)
        source = (tree() / "templates" / f"{name}.jinja").read_text()
        template = ChatTemplate(source=source, bos_token=model.named_piece(bos).decode(), eos_token="</s>")
        for talk, everything in itertools.product(TALKS, (False, True)):
            for example in render(talk, template, vocabulary, n_ctx=4096, learn_prompts=everything):
                assert [place for place, token in enumerate(example.ids) if token == bos] == [0]


@pytest.mark.parametrize(("name", "count"), [("Qwen-Qwen2.5-7B-Instruct", 1), ("Qwen-Qwen3-0.6B", 3)])
def test_a_conversation_is_one_example_unless_its_template_writes_earlier_turns_anew(name: str, count: int) -> None:
    talk = said("a", "b", "c", "d", "e", "f")
    template = ChatTemplate(source=(tree() / "templates" / f"{name}.jinja").read_text(), bos_token="", eos_token="")
    with opened("qwen2") as (vocabulary, model):
        rendered = render(talk, template, vocabulary, n_ctx=4096)
        last = model.detokenize(rendered[-1].ids[len(rendered[-1].ids) - 2 :])
    assert len(rendered) == count
    assert last == "f<|im_end|>"


def test_a_thought_that_the_prompt_opens_is_learned_where_the_data_has_one() -> None:
    source = (tree() / "templates" / "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja").read_text()
    with opened("qwen2") as (vocabulary, model):
        template = ChatTemplate(source=source, bos_token="", eos_token="<|im_end|>")

        def learned(content: str) -> str:
            (example,) = render(said("Why?", content), template, vocabulary, n_ctx=4096)
            ((_, tokens),) = learned_runs((example.ids, [bool(counts) for counts in example.learned]))
            return model.detokenize(tokens).removesuffix(model.named_piece(tokens[-1]).decode())

        ending = "<\uff5cend\u2581of\u2581sentence\uff5c>"
        assert learned("<think>\nA reason.\n</think>\n\nSo.") == f"A reason.\n</think>\n\nSo.{ending}"
        assert learned("So.") == f"\n</think>\n\nSo.{ending}"


def test_a_conversation_of_many_turns_is_read_no_further_than_a_row() -> None:
    talk = said(*("word " * 20 for _ in range(2_000)))
    with opened("qwen2") as (vocabulary, model):
        source = (tree() / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
        template = ChatTemplate(source=source, bos_token="", eos_token="")
        (example,) = render(talk, template, vocabulary, n_ctx=256)
        whole = len(model.tokenize(template.render(talk, ask=False)))
    assert len(example.ids) < 400
    assert example.length == whole
