"""``LLaMa`` as a program uses it: every method, on the demo model, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from runtime import LLaMa
from runtime.conversation.tracker import Conversation
from tests.front_door import ROOT, run
from tests.generated_models import write_model
from tests.legacy_ggml_files import write_legacy
from tests.loopback_hub import serve_hub
from toolchain.base import files
from toolchain.base.errors import ArtifactError, FoundryError, MemoryFitError, UsageError
from toolchain.base.gguf import read_header

PATIENCE_S = 120
PROMPT = "The class statement"
ANY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
UNENDING: dict[str, Any] = {"logit_bias": {2: -math.inf}}  # the demo model's end
CALLING = 'root ::= "It is add(2, 3)" [a-z]'
ALTERNATING = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] or (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}<|assistant|>"
)
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


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


@pytest.fixture
def llm(demo_gguf: Path) -> Iterator[LLaMa]:
    with LLaMa(demo_gguf, seed=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def other_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of another family and vocabulary, with a chat template of its own."""
    path = tmp_path_factory.mktemp("family") / "qwen3.gguf"
    return write_model(path, "qwen3", random=True, template=CHATML, n_ctx_train=1024)


@pytest.fixture
def tireless(demo_gguf: Path, tmp_path: Path) -> Iterator[LLaMa]:
    """The demo model with room for replies that are long enough to be interrupted."""
    longer = MetadataDetails(gguf.GGUFValueType.UINT32, 32768)
    model = with_metadata(demo_gguf, tmp_path / "tireless.gguf", {"llama.context_length": longer})
    with LLaMa(model, n_ctx=32768, seed=1) as loaded:
        yield loaded


def with_metadata(model: Path, path: Path, changes: dict[str, MetadataDetails]) -> Path:
    """A copy of ``model`` at ``path`` with other metadata."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    copy_with_new_metadata(reader, writer, changes, [])
    return path


def without_template(demo: Path, path: Path) -> Path:
    """The demo model with its template's key renamed: the same size, and no template."""
    raw = demo.read_bytes()
    path.write_bytes(raw.replace(b"tokenizer.chat_template", b"tokenizer.chat_forgotten"[:23]))
    return path


def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


# Loading


def test_every_setting_of_the_constructor_reaches_the_engine(demo_gguf: Path) -> None:
    asked = {"n_threads": 1, "n_threads_batch": 2, "n_batch": 64, "n_ubatch": 32, "type_k": "q8_0", "type_v": "f16"}
    with LLaMa(str(demo_gguf), 256, **asked, n_gpu_layers=0, n_cpu_moe=0, seed=5, system_message="Be brief.") as llm:
        made = {each["name"]: each for each in llm.load_resource_info.settings}
        assert {name: made[name]["value"] for name in asked} == asked
        assert {made[name]["origin"] for name in asked} == {"flag"}
        assert llm.n_ctx == 256
        assert llm.system_message == "Be brief."
        llm.create_native_completion(PROMPT, max_tokens=2)
        assert llm.finish_meta is not None
        assert llm.finish_meta.seed == 5


def test_recipe_is_loaded_by_name_and_the_quantization_chosen() -> None:
    with LLaMa("demo", quantize_format="Q8_0") as llm:
        assert llm.model_meta_info.quantization == "Q8_0"
    with pytest.raises(UsageError, match="has no Q5_0") as caught:
        LLaMa("demo", quantize_format="Q5_0")
    assert "Q4_K_M" in caught.value.evidence


def test_quantization_chooses_among_those_of_a_repository(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for quant in ("Q8_0", "Q4_0"):
        write_model(folder / f"model-{quant}.gguf", "llama", type=quant, n_ctx_train=256)
    program = (
        "from runtime import LLaMa\n"
        "for quant in ('Q8_0', 'q4_0'):\n"
        "    with LLaMa('acme/model', quantize_format=quant) as llm:\n"
        "        print(llm.model_meta_info.path.rpartition('-')[2])\n"
        "LLaMa('acme/model', quantize_format='Q5_0')\n"
    )
    with serve_hub({"acme/model": folder}) as hub:
        done = run([sys.executable, "-c", program], env={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")})
    assert done.stdout.split() == ["Q8_0.gguf", "Q4_0.gguf"], done.stderr
    assert "UsageError: acme/model has no Q5_0" in done.stderr


def test_ggml_file_of_2023_is_converted_and_talks(tmp_path: Path) -> None:
    original = write_legacy(tmp_path / "llama-2-tiny.ggmlv3.q4_0.bin")
    raw = original.read_bytes()
    with pytest.raises(UsageError, match=r"no Llama 70B: .* 2 layers"):
        LLaMa(original, is_70b=True)
    with LLaMa(original, quantize_format="Q4_0") as llm:
        llm.create_completion("ab", max_tokens=4)
        assert llm.model_meta_info.architecture == "llama"
    assert original.read_bytes() == raw


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_70b": True}, "llama, 4 layers .* 5.2"),
        ({"quantize_format": "Q8_0"}, "is Q4_K_M, not Q8_0"),
        ({"n_ctx": 4096}, "trained with 512"),
        ({"type_k": "f12"}, "is not a cache type"),
        ({"n_threads": 0}, "n_threads"),
        ({"lora": "nothing.gguf"}, "nothing.gguf"),
        ({"model_path": "nothing.gguf"}, "no file"),
    ],
)
def test_wrong_wish_is_a_sentence(demo_gguf: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(FoundryError, match=told):
        LLaMa(**{"model_path": demo_gguf, **changes})


def test_quiet_says_nothing_and_verbose_says_figures(demo_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for verbose, told in (
        (0, r"\A\Z"),
        (1, r"✓ load demo-Q4_K_M.gguf.*\n2 tokens in .*; length\n\Z"),
        (2, "llama_context:"),
    ):
        with LLaMa(demo_gguf, verbose=verbose) as llm:
            llm.create_native_completion(PROMPT, max_tokens=2)
        out, err = capfd.readouterr()
        assert not out
        assert re.search(told, err), err


def test_terminal_sees_a_bar_while_the_model_loads_and_nothing_of_it_after(demo_gguf: Path) -> None:
    program = "import sys; from runtime import LLaMa; LLaMa(sys.argv[1]).close()"
    master, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(demo_gguf)], cwd=ROOT, stderr=terminal, env={**os.environ, "TERM": "xterm"}
    )
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while part := os.read(master, 4096):
            seen += part
    os.close(master)
    assert child.wait(PATIENCE_S) == 0, seen
    assert b"load demo-Q4_K_M.gguf" in seen
    assert "✓".encode() not in seen


def test_resources_add_up_to_the_file_and_the_plan(llm: LLaMa) -> None:
    told = llm.load_resource_info
    assert told.layers == len(told.per_layer_bytes) == 4
    assert told.vram_bytes + told.ram_bytes == sum(
        device[part] for device in told.devices for part in ("weights_bytes", "kv_bytes", "compute_bytes")
    )
    weights = sum(told.per_layer_bytes) + told.output_layer_bytes + told.input_bytes
    kv = sum(device["kv_bytes"] for device in told.devices)
    assert weights == pytest.approx(llm.model_meta_info.bytes + kv, rel=0.01)
    assert told.expected_max_bytes > told.output_layer_bytes + sum(told.per_layer_bytes)
    json.dumps(told.as_dict())


def test_header_is_told_in_words(llm: LLaMa, demo_gguf: Path) -> None:
    told, header = llm.model_meta_info, read_header(demo_gguf)
    assert (told.architecture, told.quantization, told.layers, told.heads, told.kv_heads) == (
        "llama",
        "Q4_K_M",
        4,
        8,
        4,
    )
    assert (told.vocabulary, told.n_ctx_train, told.rope_freq_base) == (4096, 512, 10000.0)
    assert told.parameters == header.n_params
    assert told.bits_per_weight == pytest.approx(header.bits_per_weight)
    assert told.has_chat_template
    json.dumps(told.as_dict())


def test_closed_model_is_told_and_comes_back_with_its_conversation(llm: LLaMa) -> None:
    llm.create_completion("Hello", max_tokens=5)
    said = llm.messages
    llm.close()
    llm.close()
    for use in (lambda: llm.create_completion("x"), lambda: llm.tokenize("x"), lambda: llm.n_ctx):
        with pytest.raises(UsageError, match="closed") as caught:
            use()
        assert "reload()" in caught.value.hint
    llm.reload(n_ctx=300, n_threads=1)
    assert (llm.n_ctx, llm.messages) == (300, said)
    llm.create_completion("And?", max_tokens=5)


def test_failed_reload_leaves_the_loaded_model(llm: LLaMa) -> None:
    with pytest.raises(UsageError, match="no file"):
        llm.reload("nothing.gguf")
    with pytest.raises(UsageError, match="no setting 'n_thread'"):
        llm.reload(n_thread=2)
    llm.create_native_completion(PROMPT, max_tokens=2)


@pytest.mark.parametrize(
    "wish",
    [
        {"n_ctx": 4096},
        {"n_threads": 0},
        {"type_k": "f12"},
        {"tensor_split": "a"},
        {"lora": "nothing.gguf"},
        {"lora": str(ROOT / "README.md")},
    ],
)
def test_wrong_wish_at_reload_leaves_the_loaded_model(llm: LLaMa, wish: dict[str, Any]) -> None:
    llm.create_native_completion(PROMPT * 20, max_tokens=2)
    with pytest.raises(FoundryError):
        llm.reload(**wish)
    llm.create_native_completion(PROMPT * 20, max_tokens=2)
    assert llm.finish_meta is not None
    assert llm.finish_meta.cached_tokens > 0
    llm.reload()


def test_load_that_fails_leaves_a_reload_that_works(llm: LLaMa, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import prepare

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_engine", _too_little)
        with pytest.raises(MemoryFitError):
            llm.reload(n_ctx=128)
    with pytest.raises(UsageError, match="no model in memory"):
        llm.create_completion("Hello")
    llm.reload()
    assert llm.n_ctx == 512


def _too_little(*_: object, **__: object) -> None:
    raise MemoryFitError("too little memory")


def test_reload_takes_shares_as_the_constructor_does_and_keeps_verbose(
    llm: LLaMa, capfd: pytest.CaptureFixture[str]
) -> None:
    llm.verbose = 1
    llm.reload(n_ctx=64, tensor_split=(1,))
    made = {each["name"]: each["value"] for each in llm.load_resource_info.settings}
    assert (made["tensor_split"], llm.verbose) == ("1", 1)
    assert "load demo-Q4_K_M.gguf" in capfd.readouterr().err


def test_generator_of_a_model_that_is_gone_is_refused(llm: LLaMa, other_family: Path) -> None:
    pieces = llm.create_native_generator(PROMPT, max_tokens=2)
    llm.reload(other_family)
    with pytest.raises(UsageError, match="loaded anew"):
        next(pieces)


def test_other_model_goes_on_with_the_conversation(llm: LLaMa, other_family: Path) -> None:
    llm.create_completion("Hello", max_tokens=5)
    said = llm.messages
    llm.reload(other_family)
    assert llm.model_meta_info.architecture == "qwen3"
    llm.create_completion("And?", max_tokens=3)
    assert llm.messages[:2] == said


def test_dropped_model_is_freed(demo_gguf: Path) -> None:
    llm = LLaMa(demo_gguf)
    engine = llm._engine
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert engine.model.handle is None


def test_adapters_are_switched_while_the_model_is_loaded(llm: LLaMa, demo_gguf: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(adapter, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    shape = next(each.shape for each in read_header(demo_gguf).tensors if each.name == "blk.0.ffn_up.weight")
    import numpy as np

    numbers = np.random.default_rng(0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", numbers.normal(0, 1, (4, shape[0])).astype(np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", numbers.normal(0, 1, (shape[1], 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def said() -> str:
        return llm.create_native_completion(PROMPT, temperature=0, max_tokens=12)

    plain = said()
    llm.set_adapters((adapter, 0.5))
    changed = said()
    llm.set_adapters()
    assert said() == plain != changed
    llm.set_adapters(f"{adapter}=0.5")
    assert said() == changed
    llm.reload()
    assert said() == changed
    with LLaMa(demo_gguf, lora=(adapter, 0.5)) as other:
        assert other.create_native_completion(PROMPT, temperature=0, max_tokens=12) == changed
        other.set_adapters()
        assert other.create_native_completion(PROMPT, temperature=0, max_tokens=12) == plain
    with pytest.raises(UsageError, match="not a LoRA adapter"):
        llm.set_adapters(demo_gguf)


# Text and tokens


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        " spaced  twice ",
        "line\n\nbreaks\t",
        "wörter, 漢字 und 😀",
        "<s>framed</s>",
        "a </s> b",
        "\x00\x7f",
    ],
)
@pytest.mark.parametrize("adds_space", [False, True])
def test_detokenize_undoes_tokenize(text: str, adds_space: bool, demo_gguf: Path, tmp_path: Path) -> None:
    prefix = MetadataDetails(gguf.GGUFValueType.BOOL, adds_space)
    model = with_metadata(demo_gguf, tmp_path / "model.gguf", {"tokenizer.ggml.add_space_prefix": prefix})
    with LLaMa(model) as llm:
        tokens = llm.tokenize(text)
        assert llm.detokenize(tokens) == text
        assert llm.get_n_tokens(text) == len(tokens) == len(llm.tokenize_as_str(text))
        assert "".join(llm.tokenize_as_str(text)) == text


def test_bos_is_added_when_it_is_asked_for(llm: LLaMa) -> None:
    assert llm.tokenize("x", add_bos=True) == [1, *llm.tokenize("x")]


def test_cut_characters_and_alien_tokens_harm_nobody(llm: LLaMa) -> None:
    cut = llm.tokenize("😀")[:-1]
    assert set(llm.detokenize(cut)) == {"\ufffd"}
    assert llm.detokenize(llm.tokenize("\ud800")) == "?"
    for alien in (-1, 4096, 2**31):
        with pytest.raises(UsageError, match="there is no token"):
            llm.detokenize([alien])


# Raw text


def test_native_reply_is_reproduced_by_its_seed_and_told_of(llm: LLaMa) -> None:
    llm.seed = None
    text = llm.create_native_completion(PROMPT, max_tokens=20, endless=True)
    meta = llm.finish_meta
    assert meta is not None
    assert (meta.finish_reason, meta.completion_tokens) == ("length", 20)
    assert meta.generation_ms > 0 < meta.prompt_ms
    assert meta.tokens_per_second == pytest.approx(19 / meta.generation_ms * 1000)
    pieces = list(llm.create_native_generator(PROMPT, max_tokens=20, endless=True, seed=meta.seed))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert llm.messages == []


def test_stop_text_ends_the_reply_and_is_not_part_of_it(llm: LLaMa) -> None:
    whole = llm.create_native_completion(PROMPT, max_tokens=40, temperature=0)
    stop = whole[20:24]
    assert llm.create_native_completion(PROMPT, max_tokens=40, temperature=0, stop=stop) == whole[: whole.index(stop)]
    assert llm.finish_meta is not None
    assert llm.finish_meta.finish_reason == "stop"


def test_endless_goes_on_until_the_limit_or_the_context(llm: LLaMa) -> None:
    ends = {"token_prob_abs": {"</s>": 1.0}}
    assert llm.create_native_completion(PROMPT, max_tokens=50, **ends) == ""
    assert llm.finish_meta is not None
    assert llm.finish_meta.finish_reason == "stop"
    with pytest.raises(UsageError, match="endless bans"):
        llm.create_native_completion(PROMPT, endless=True, **ends)
    llm.create_native_completion(PROMPT, endless=True, max_tokens=50, token_prob_delta={"</s>": 100.0})
    assert (llm.finish_meta.finish_reason, llm.finish_meta.completion_tokens) == ("length", 50)
    llm.create_native_completion(PROMPT, endless=True)
    assert llm.finish_meta.finish_reason == "context"
    assert llm.finish_meta.prompt_tokens + llm.finish_meta.completion_tokens == llm.n_ctx + 1
    with pytest.raises(UsageError, match="grammar"):
        llm.create_native_completion(PROMPT, endless=True, json_schema={"type": "null"})


def test_absolute_probability_is_the_frequency(llm: LLaMa) -> None:
    chances = {"x": 0.5, "y": 0.25}
    text = llm.create_native_completion("x", token_prob_abs=chances, endless=True, seed=1, **ANY)
    assert llm.finish_meta is not None
    n = llm.finish_meta.completion_tokens
    assert n > 400
    for letter, share in (("x", 0.5), ("y", 0.25)):
        drawn = len(re.findall(letter, text))
        assert abs(drawn - share * n) < 5 * math.sqrt(share * (1 - share) * n)
    assert set(llm.create_native_completion("x", token_prob_abs={"x": 0.5, "y": 0.5}, max_tokens=50, **ANY)) == {
        "x",
        "y",
    }


def test_delta_multiplies_the_odds(llm: LLaMa) -> None:
    token = llm.tokenize(" the")[0]

    def odds(delta: float) -> float:
        count, rounds = 0, 300
        for seed in range(rounds):
            llm.create_native_completion(
                PROMPT, max_tokens=1, seed=seed, token_prob_delta={token: delta}, endless=True, logprobs=0, **ANY
            )
            assert llm.finish_meta is not None
            count += llm.finish_meta.logprobs[0].token == token
        return count / (rounds - count)

    llm.create_native_completion(PROMPT, max_tokens=1, logprobs=4096, **ANY)
    assert llm.finish_meta is not None
    p = math.exp(next(each.logprob for each in llm.finish_meta.logprobs[0].top if each.token == token))
    shift = -math.log(p / (1 - p))  # to even odds
    assert 0.6 < odds(shift) < 1.6
    assert odds(-math.inf) == 0


def test_token_that_is_none_or_several_is_told(llm: LLaMa) -> None:
    for wrong in ({"several tokens": 1.0}, {99999: 1.0}, {"": 1.0}, {"x": math.nan}, {"x": math.inf}):
        with pytest.raises(UsageError, match="token_prob_delta"):
            llm.create_native_generator(PROMPT, token_prob_delta=wrong)
    for wrong in ({"x": 1.5}, {"x": -0.1}, {"x": 0.6, "y": 0.6}, {"x": "much"}, {"x": None}, {5.0: 0.5}, [5]):
        with pytest.raises(UsageError, match="token_prob_abs"):
            llm.create_native_generator(PROMPT, token_prob_abs=wrong)


def test_ban_of_every_token_is_told(llm: LLaMa) -> None:
    with pytest.raises(UsageError, match="no token is left"):
        llm.create_native_completion(PROMPT, token_prob_delta=dict.fromkeys(range(4096), -math.inf), max_tokens=3)


def test_logprobs_are_the_models_own_whatever_is_done_to_them(llm: LLaMa) -> None:
    llm.create_native_completion(PROMPT, max_tokens=3, temperature=0, logprobs=2)
    assert llm.finish_meta is not None
    plain = llm.finish_meta.logprobs
    assert [len(each.top) for each in plain] == [2, 2, 2]
    assert all(each.logprob == each.top[0].logprob for each in plain)
    llm.create_native_completion(PROMPT, max_tokens=1, temperature=0, logprobs=2, token_prob_abs={"x": 1.0})
    assert llm.finish_meta.logprobs[0].piece == b"x"
    assert llm.finish_meta.logprobs[0].top == plain[0].top


def test_schema_and_lookup_and_every_sampler_are_taken(llm: LLaMa) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["a"]}
    reply = llm.create_native_completion(PROMPT, json_schema=schema, max_tokens=60)
    assert 1 <= json.loads(reply)["a"] <= 9
    llm.create_native_completion(PROMPT, json_schema=json.dumps(schema), max_tokens=60)
    llm.create_native_completion(
        PROMPT, lookup=True, max_tokens=5, typical=0.9, top_nsigma=2.0, xtc_probability=0.1, xtc_threshold=0.2,
        dynatemp_range=0.1, dynatemp_exp=1.0, repeat_penalty=1.1, repeat_last_n=32, frequency_penalty=0.1,
        presence_penalty=0.1, dry_multiplier=0.5, dry_base=1.75, dry_allowed_length=2, dry_penalty_last_n=64,
        dry_sequence_breakers=["\n"], mirostat=0, mirostat_lr=0.1, mirostat_ent=5.0, logit_bias={5: -1.0},
    )  # fmt: skip


# Chat


def test_conversation_goes_on_and_reuses_the_cache(llm: LLaMa) -> None:
    first = llm.create_completion("What is a class?", max_tokens=8, seed=1)
    assert llm.messages == [
        {"role": "user", "content": "What is a class?"},
        {"role": "assistant", "content": first.rstrip()},
    ]
    llm.create_completion("And then?", max_tokens=8, seed=1)
    assert llm.finish_meta is not None
    assert llm.finish_meta.cached_tokens > 0
    assert [each["role"] for each in llm.messages] == ["user", "assistant"] * 2
    assert not first.startswith(" ")


def test_prompt_is_the_templates_and_nothing_is_kept_of_it(llm: LLaMa) -> None:
    llm.system_message = "Be brief."
    llm.add_message("user", "One")
    llm.add_message("assistant", "Two")
    built = llm.build_prompt("Three")
    said = "<|system|>\nBe brief.</s>\n<|user|>\nOne</s>\n<|assistant|>\nTwo</s>\n<|user|>\nThree</s>\n"
    assert built == f"<s>{said}<|assistant|>\n"
    assert len(llm.messages) == 3
    with pytest.raises(UsageError, match="no message to answer"):
        llm.build_prompt()
    llm.create_completion("Three", max_tokens=1)
    assert llm.finish_meta is not None
    assert llm.finish_meta.prompt_tokens == len(llm.tokenize(built))


def test_model_without_a_template_gets_lines_of_a_dialogue(demo_gguf: Path, tmp_path: Path) -> None:
    with LLaMa(without_template(demo_gguf, tmp_path / "plain.gguf")) as llm:
        assert not llm.model_meta_info.has_chat_template
        assert llm.build_prompt("Hello") == "User: Hello\nAssistant:"
        llm.create_completion("Hello", max_tokens=5)


def test_messages_that_stand_by_themselves_leave_the_conversation_alone(llm: LLaMa) -> None:
    llm.add_message("user", "tracked")
    llm.create_completion([{"role": "system", "content": "S"}, {"role": "user", "content": "alone"}], max_tokens=4)
    assert llm.messages == [{"role": "user", "content": "tracked"}]
    assert "tracked" not in llm.build_prompt([{"role": "user", "content": "alone"}])
    for wrong in (
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user"}],
    ):
        with pytest.raises(UsageError):
            llm.create_completion(wrong)  # type: ignore[arg-type]


def test_conversation_as_it_stands_is_answered(llm: LLaMa) -> None:
    with pytest.raises(UsageError, match="no message to answer"):
        llm.create_completion()
    llm.add_message("user", "What is a class?")
    llm.create_completion(max_tokens=4)
    assert [each["role"] for each in llm.messages] == ["user", "assistant"]
    with pytest.raises(UsageError, match="no message to answer"):
        llm.create_completion()


def test_failed_call_leaves_the_conversation_as_it_was(llm: LLaMa) -> None:
    llm.create_completion("Hello", max_tokens=4)
    before = llm.messages
    with pytest.raises(UsageError, match="the context holds 512"):
        llm.create_completion("word " * 2000)
    with pytest.raises(UsageError, match="no token is left"):
        llm.create_completion("Hello", grammar='root ::= "ab"', logit_bias=dict.fromkeys(range(4096), -math.inf))
    with pytest.raises(UsageError):
        llm.create_completion("Hello", temperature=-1)
    for wrong in (["Hello"], b"Hello", [None], {"role": "user", "content": "Hello"}):
        with pytest.raises(UsageError):
            llm.create_completion(wrong)
    with pytest.raises(UsageError):
        llm.add_message("user", None)
    assert llm.messages == before
    assert llm.finish_meta is None
    llm.create_completion("Go on", max_tokens=4)


def test_ctrl_c_leaves_the_conversation_as_it_was_and_the_model_usable(tireless: LLaMa) -> None:
    llm = tireless
    before = llm.messages
    pieces = llm.create_generator("Hello", **UNENDING)
    next(pieces)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.messages == before
    assert llm.finish_meta is None
    llm.create_completion("Hello", max_tokens=4)


def test_programs_own_handler_of_sigint_stays_in_charge(llm: LLaMa) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        pieces = llm.create_generator("Hello", grammar="root ::= [a-z ]{40}")
        next(pieces)
        signal.raise_signal(signal.SIGINT)
        assert len(list(pieces)) > 3
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT]


def test_left_generator_keeps_what_came(llm: LLaMa) -> None:
    pieces = llm.create_generator("Hello", max_tokens=100, grammar="root ::= [a-z ]{100}")
    came = "".join(islice(pieces, 3))
    pieces.close()
    assert llm.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": came.rstrip()}]
    assert llm.finish_meta is not None
    assert llm.finish_meta.finish_reason == "cancelled"
    assert 0 < llm.finish_meta.completion_tokens < 100


def test_cancel_ends_the_reply_and_keeps_what_came(llm: LLaMa) -> None:
    came = []
    for piece in llm.create_generator("Hello", grammar="root ::= [a-z ]{200}"):
        came.append(piece)
        if len(came) == 3:
            llm.cancel()
    assert llm.finish_meta is not None
    assert llm.finish_meta.finish_reason == "cancelled"
    assert llm.messages[-1] == {"role": "assistant", "content": "".join(came).rstrip()}
    llm.cancel()
    llm.create_completion("Go on", max_tokens=3)
    assert llm.finish_meta.finish_reason != "cancelled"


def test_oldest_turns_are_left_out_of_the_prompt_and_stay_in_the_conversation(llm: LLaMa) -> None:
    llm.system_message = "Be brief."
    for number in range(30):
        llm.create_completion(f"Question {number}: what is a class statement in Python?", max_tokens=12)
    assert llm.finish_meta is not None
    assert llm.finish_meta.dropped_turns > 0
    assert len(llm.messages) == 61
    built = llm.build_prompt("The last one")
    assert built.startswith("<s><|system|>\nBe brief.</s>\n<|user|>\nQuestion")
    assert "Question 0:" not in built
    assert "The last one" in built
    assert len(llm.tokenize(built)) <= 512 - 128


def test_messages_that_stand_by_themselves_are_fitted_whatever_was_left_out_before(llm: LLaMa, demo_gguf: Path) -> None:
    for number in range(12):
        llm.create_completion(f"Question {number}: what is a class statement in Python? " * 2, stop=["e", "a"])
    assert llm.finish_meta is not None
    assert llm.finish_meta.dropped_turns > 2
    alone = [*llm.messages, {"role": "user", "content": "And?"}]
    with LLaMa(demo_gguf) as fresh:
        assert llm.build_prompt(alone, max_tokens=1) == fresh.build_prompt(alone, max_tokens=1)
        left_out = []
        for each in (llm, fresh):
            each.create_completion(alone, max_tokens=1)
            assert each.finish_meta is not None
            left_out.append((each.finish_meta.dropped_turns, each.finish_meta.prompt_tokens))
        assert left_out[0] == left_out[1]


def test_conversation_that_was_cleared_by_hand_forgets_what_was_left_out(llm: LLaMa) -> None:
    for number in range(12):
        llm.create_completion(f"Question {number}: what is a class statement in Python? " * 2, max_tokens=4)
    assert llm.finish_meta is not None
    assert llm.finish_meta.dropped_turns > 2
    llm.conversation.reset()
    for question in ("One", "Two", "Three"):
        llm.create_completion(question, max_tokens=4)
    assert llm.finish_meta.dropped_turns == 0
    assert "One" in llm.build_prompt("Four")


def test_preserved_sequence_comes_in_one_piece(llm: LLaMa) -> None:
    formula = {"grammar": 'root ::= "So $$x^2 + y^2 = z^2$$ holds."', "max_tokens": 60}
    pieces = list(llm.create_generator("Pythagoras?", **formula))
    assert "$$x^2 + y^2 = z^2$$" in pieces
    assert "".join(pieces) == "So $$x^2 + y^2 = z^2$$ holds."
    assert "$$x^2 + y^2 = z^2$$" not in list(llm.create_generator("Again?", preserve=None, **formula))


# The conversation


def test_conversation_survives_yaml_and_other_models(
    llm: LLaMa, demo: dict[str, Any], other_family: Path, tmp_path: Path
) -> None:
    llm.system_message = "Répondez: oui # ou non"
    llm.create_completion("What is a class?\n\n  indented: [yes]", max_tokens=12, seed=1)
    path = tmp_path / "talk.yaml"
    llm.save_conversation(path)
    q8_0 = next(each["path"] for each in demo["artifacts"] if each["type"] == "Q8_0")
    for model in (q8_0, other_family):
        with LLaMa(model) as other:
            other.load_conversation(path)
            assert other.messages == llm.messages
            assert other.system_message == llm.system_message
            other.create_completion("Go on", max_tokens=4)
            assert other.messages[:3] == llm.messages
            assert len(other.messages) == 5


def test_broken_yaml_leaves_the_conversation_as_it_was(llm: LLaMa, tmp_path: Path) -> None:
    llm.add_message("user", "Hello")
    path = tmp_path / "talk.yaml"
    path.write_text("- role: nobody\n  content: [")
    with pytest.raises(UsageError, match=r"talk\.yaml"):
        llm.load_conversation(path)
    assert llm.messages == [{"role": "user", "content": "Hello"}]


def test_messages_are_added_taken_back_adopted_and_inverted(llm: LLaMa, demo_gguf: Path) -> None:
    llm.system_message = "S"
    llm.add_message("user", "U")
    llm.add_message("assistant", "A")
    with pytest.raises(UsageError):
        llm.add_message("system", "another")
    with LLaMa(demo_gguf) as other:
        other.adopt(llm)
        assert other.messages == llm.messages
        other.invert_roles()
        assert [each["role"] for each in other.messages] == ["system", "assistant", "user"]
        assert other.pop_message()["content"] == "A"
        assert len(llm.messages) == 3
        other.adopt(Conversation())
        assert other.messages == []
    llm.reset()
    assert llm.messages == [{"role": "system", "content": "S"}]
    with pytest.raises(UsageError):
        llm.pop_message()
    llm.system_message = ""
    assert llm.messages == []


# Symbols and functions


def test_symbols_stand_for_values_and_functions_in_user_and_system_texts(llm: LLaMa) -> None:
    llm.register_symbol("USER", "Ada")
    llm.register_symbol("TWICE", lambda text="no": text * 2)
    llm.system_message = "Talk with [[USER]]."
    built = llm.build_prompt("I am [[USER]], [[TWICE('ab')]], [[NOBODY]].")
    assert "Talk with Ada." in built
    assert "I am Ada, abab, [[NOBODY: missing]]." in built
    llm.create_completion("I am [[USER]].", max_tokens=2)
    parts = [{"type": "text", "text": "I am [[USER]]."}]
    assert "I am Ada." in llm.build_prompt([{"role": "user", "content": parts}])
    llm.register_symbol("USER", "Bob")
    assert llm.messages[1]["content"] == "I am Ada."
    assert "Talk with Bob." in llm.build_prompt("x")
    assert llm.system_message == "Talk with [[USER]]."


def test_called_function_answers_and_the_reply_goes_on(llm: LLaMa) -> None:
    called = []

    def area(width: int, height: int) -> int:
        """The area of a room."""
        called.append((width, height))
        return width * height

    assert llm.register_function(area) is area  # so that it decorates one
    llm.register_functions(add)
    assert "area(width: int, height: int) -> int" in llm.build_prompt("How large?")
    pieces = list(llm.create_generator("How large?", grammar='root ::= "It is area(3, 4)" [x]', max_function_calls=2))
    assert called == [(3, 4), (3, 4)]
    assert "".join(pieces) == "It is area(3, 4)\nIt is area(3, 4)\nIt is area(3, 4)x"
    assert [(each["role"], each["content"]) for each in llm.messages] == [
        ("user", "How large?"),
        ("assistant", "It is area(3, 4)"),
        ("tool", "12"),
        ("assistant", "It is area(3, 4)"),
        ("tool", "12"),
        ("assistant", "It is area(3, 4)x"),
    ]
    meta = llm.finish_meta
    assert meta is not None
    assert [(each.name, each.text, each.result, each.failed) for each in meta.function_calls] == [
        ("area", "area(3, 4)", "12", False)
    ] * 2
    assert meta.finish_reason == "stop"
    assert "area returned: 12" in llm.build_prompt("And?")


def test_call_is_text_where_functions_are_off_or_unknown(llm: LLaMa) -> None:
    assert llm.create_completion("Sum?", grammar=CALLING)[:-1] == "It is add(2, 3)"
    llm.register_function(add)
    assert llm.create_completion("Sum?", grammar=CALLING, functions=False)[:-1] == "It is add(2, 3)"
    assert llm.finish_meta is not None
    assert llm.finish_meta.function_calls == ()
    assert "add(a" not in llm.build_prompt("Sum?", functions=False)


def test_function_that_raises_or_is_miscalled_tells_the_model(llm: LLaMa) -> None:
    def fails() -> None:
        raise OSError("no disk")

    llm.register_function(fails)
    llm.register_function(add, name="plus", description="Adds.")
    for written, told in (("fails()", "fails raised OSError: no disk"), ("plus(1)", "plus(a: int, b: int) -> int")):
        llm.create_completion("Go", grammar=f'root ::= "{written}" [x]', max_function_calls=1)
        assert llm.finish_meta is not None
        (call,) = llm.finish_meta.function_calls
        assert (call.text, call.failed) == (written, True)
        assert told in call.result
        assert llm.messages[-2] == {"role": "tool", "content": call.result, "name": call.name}


def test_function_may_not_use_the_model_that_calls_it(llm: LLaMa) -> None:
    def ask() -> str:
        return llm.create_completion("inner")

    llm.register_function(ask)
    llm.create_completion("Go", grammar='root ::= "ask()" [x]', max_function_calls=1)
    assert llm.finish_meta is not None
    assert "in the middle of a reply" in llm.finish_meta.function_calls[0].result


def test_call_that_was_cancelled_is_not_carried_out(llm: LLaMa) -> None:
    llm.register_function(add)
    for piece in llm.create_generator("Sum?", grammar=CALLING):
        if ")" in piece:
            llm.cancel()
    assert llm.finish_meta is not None
    assert (llm.finish_meta.function_calls, llm.finish_meta.finish_reason) == ((), "cancelled")
    assert llm.messages[-1] == {"role": "assistant", "content": "It is add(2, 3)"}


def test_limit_of_tokens_holds_over_all_rounds(llm: LLaMa) -> None:
    llm.register_function(add)
    llm.create_completion("Sum?", grammar=CALLING, max_tokens=25)
    assert llm.finish_meta is not None
    assert llm.finish_meta.completion_tokens <= 25
    assert llm.finish_meta.finish_reason == "length"


def test_reply_that_ended_at_a_result_is_followed_by_a_question_in_any_template(tmp_path: Path) -> None:
    strict = write_model(tmp_path / "strict.gguf", "llama", random=True, template=ALTERNATING, n_ctx_train=1024)
    with LLaMa(strict) as llm:
        llm.register_function(lambda: 5, name="five")
        llm.create_completion("Go", grammar='root ::= "five()" [x]', max_tokens=6)
        assert llm.messages[-1]["role"] == "tool"
        assert llm.build_prompt("And?").endswith("<|user|>five returned: 5\n\nAnd?<|end|><|assistant|>")
        llm.create_completion("And?", max_tokens=2)


def test_results_that_fill_the_context_end_the_reply(llm: LLaMa) -> None:
    llm.register_function(lambda: "word " * 150, name="long")
    llm.create_completion("Go", grammar='root ::= "long()" [x]')
    assert llm.finish_meta is not None
    assert llm.finish_meta.finish_reason == "context"
    llm.create_completion("And now?", max_tokens=3, functions=False)


# State


def test_state_goes_on_in_another_process(llm: LLaMa, demo_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.state"
    with pytest.raises(UsageError, match="nothing to save"):
        llm.save_state(path)
    llm.system_message = "Be brief."
    llm.create_completion("What is a class?", max_tokens=12, seed=1)
    llm.save_state(path)
    assert path.stat().st_mode & 0o077 == 0
    here = llm.create_completion("And then?", max_tokens=12, seed=2)
    assert llm.finish_meta is not None
    cached = llm.finish_meta.cached_tokens
    program = (
        "import json, sys\nfrom runtime import LLaMa\n"
        "with LLaMa(sys.argv[1]) as llm:\n"
        "    tokens = llm.load_state(sys.argv[2])\n"
        "    reply = llm.create_completion('And then?', max_tokens=12, seed=2)\n"
        "    print(json.dumps([tokens, reply, llm.messages, llm.finish_meta.cached_tokens]))\n"
    )
    done = run([sys.executable, "-c", program, str(demo_gguf), str(path)])
    assert done.returncode == 0, done.stderr
    tokens, reply, messages, cached_there = json.loads(done.stdout)
    assert (reply, messages, cached_there) == (here, llm.messages, cached)
    assert tokens >= cached > 0


def test_state_of_another_model_or_damaged_leaves_the_conversation(
    llm: LLaMa, other_family: Path, tmp_path: Path
) -> None:
    path = tmp_path / "talk.state"
    with LLaMa(other_family) as other:
        other.create_completion("Hello", max_tokens=2)
        other.save_state(path)
    llm.create_completion("Mine", max_tokens=2)
    before = llm.messages
    with pytest.raises(UsageError, match="another model"):
        llm.load_state(path)
    llm.save_state(path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="damaged"):
        llm.load_state(path)
    for no_file in (tmp_path / "nothing", tmp_path, "a\0b"):
        with pytest.raises(UsageError):
            llm.load_state(no_file)
    with pytest.raises(UsageError, match="is a directory"):
        llm.save_state(tmp_path)
    assert llm.messages == before
    llm.create_completion("Go on", max_tokens=2)


# One at a time


def test_second_call_is_refused_while_a_reply_is_running_and_harms_nothing(llm: LLaMa, tmp_path: Path) -> None:
    alone = llm.create_completion("Hello", max_tokens=12, seed=1)
    llm.reset()
    pieces = llm.create_generator("Hello", max_tokens=12, seed=1)
    came = [next(pieces)]
    for use in (
        lambda: llm.create_completion("other"),
        lambda: llm.create_native_completion("other"),
        lambda: llm.add_message("user", "other"),
        lambda: llm.save_state(tmp_path / "state"),
        llm.set_adapters,
        llm.reload,
        llm.reset,
        lambda: llm.build_prompt("other"),
    ):
        with pytest.raises(UsageError, match="in the middle of a reply"):
            use()
    llm.tokenize("is free at all times")
    assert "".join([*came, *pieces]) == alone


def test_threads_take_turns_and_close_ends_a_reply_that_was_left(llm: LLaMa) -> None:
    found: list[str] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(llm.create_completion("Hello", max_tokens=4)))
        thread.start()
        thread.join()
    assert len(found) == 3
    pieces = llm.create_generator("Hello", max_tokens=50, grammar="root ::= [a-z ]{50}")
    next(pieces)
    llm.close()
    assert list(pieces) == []
    assert len(llm.messages) == 8


def test_beside_a_running_loop_it_blocks_nobody_in_a_thread(llm: LLaMa) -> None:
    async def main() -> tuple[str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        reply = await asyncio.to_thread(llm.create_completion, "Hello", grammar="root ::= [a-z ]{80}")
        here = "".join(llm.create_generator("And here", max_tokens=4))
        ticking.cancel()
        return reply + here, ticks

    reply, ticks = asyncio.run(main())
    assert len(reply) > 40
    assert ticks > 10


# Documentation


def test_examples_of_the_page_run(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = (ROOT / "docs" / "llama.md").read_text().partition("<!-- From here on")[0]
    examples = "\n".join(re.findall(r"```python\n(.*?)```", start, re.DOTALL))
    assert examples.count("llm.") > 20
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models" / "demo" / "demo-Q4_K_M.gguf"
    path.parent.mkdir(parents=True)
    path.symlink_to(demo_gguf)
    exec(compile(examples, "llama.md", "exec"), {})
