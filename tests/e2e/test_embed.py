"""Vectors of texts: from a BERT made for the purpose, and from the demo model."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from runtime.commands.embed import check_room
from runtime.commands.options import request_of
from runtime.engine import Engine
from runtime.engine.embeddings import Embedder, Pooling
from runtime.engine.load import load, load_model
from runtime.prepare import prepare
from runtime.settings import Settings, settle
from tests.generated_models import write_model
from tests.tiny_bert import N_CTX, N_EMBD, write_bert
from toolchain.base import machine
from toolchain.base.errors import MemoryFitError, UsageError
from toolchain.base.files import PROJECT_ROOT
from toolchain.build.toolchain import Toolchain

HERE = machine.probe()
TEXTS = ["the cat sat on a mat", "the dog", "a dog ran far away the cat sat", "mat"]


def settings_with(**flags: int | str) -> Settings:
    return settle(machine=HERE, n_ctx_train=None, flags={"n_ctx": N_CTX, "n_gpu_layers": 0, **flags})


@pytest.fixture(scope="module")
def bert(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert") / "bert.gguf")


@pytest.fixture(scope="module")
def embedder(bert: Path) -> Iterator[Embedder]:
    model = load_model(bert, settings_with())
    embedder = Embedder(model, settings_with())
    yield embedder
    embedder.close()
    model.close()


@pytest.fixture(scope="module")
def writer(demo_gguf: Path) -> Iterator[Engine]:
    with load(demo_gguf, settings_with(n_ctx=512)) as engine:
        yield engine


def per_token(embedder: Embedder, text: str) -> np.ndarray:
    """The vectors of the text's tokens before any pooling, from the library's own call for them."""
    lib, model = embedder.model.lib, embedder.model
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.embeddings, params.pooling_type, params.flash_attn_type = True, 0, 0
    context = lib.llama_init_from_model(model.handle, params)
    try:
        tokens = embedder.tokenize([text])[0]
        kept = (lib.llama_token * len(tokens))(*tokens)
        batch = lib.llama_batch_get_one(kept, len(tokens))
        run = lib.llama_decode if lib.llama_get_memory(context) else lib.llama_encode
        assert run(context, batch) == 0
        rows = [lib.llama_get_embeddings_ith(context, i) for i in range(len(tokens))]
        return np.array([np.ctypeslib.as_array(row, (embedder.n_embd,)) for row in rows])
    finally:
        lib.llama_free(context)


def test_text_stands_between_the_model_s_special_tokens(embedder: Embedder) -> None:
    assert embedder.tokenize(["the cat"]) == [[2, 4, 5, 3]]


@pytest.mark.parametrize(
    ("pooling", "pool"), [("mean", lambda x: x.mean(0)), ("cls", lambda x: x[0]), ("last", lambda x: x[-1])]
)
def test_pooling_is_of_the_tokens_vectors(embedder: Embedder, pooling: Pooling, pool: Any) -> None:
    one = Embedder(embedder.model, settings_with(), pooling=pooling)
    try:
        found = one.embed(one.tokenize(TEXTS), normalize=False)
        assert found.shape == (len(TEXTS), N_EMBD)
        assert found.dtype == np.float32
        for text, vector in zip(TEXTS, found, strict=True):
            assert np.abs(vector - pool(per_token(embedder, text))).max() < 1e-4
    finally:
        one.close()


def test_text_alone_and_among_others_has_one_vector(embedder: Embedder) -> None:
    many = embedder.embed(embedder.tokenize(TEXTS * 40))
    for number, text in enumerate(TEXTS):
        alone = embedder.embed(embedder.tokenize([text]))[0]
        assert np.abs(many[number::4] - alone).max() < 1e-4


def test_vectors_have_length_one_unless_asked_as_they_are(embedder: Embedder) -> None:
    tokens = embedder.tokenize(TEXTS)
    plain, unit = embedder.embed(tokens, normalize=False), embedder.embed(tokens)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    assert np.allclose(plain / np.linalg.norm(plain, axis=1, keepdims=True), unit, atol=1e-5)


def test_no_text_makes_no_vector(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, N_EMBD)


def test_text_that_is_too_long_is_named_or_cut(embedder: Embedder) -> None:
    long = "cat " * 200
    with pytest.raises(UsageError, match="text 2 has 202 tokens, the model takes 128"):
        embedder.tokenize(["dog", long])
    cut = embedder.tokenize([long], truncate=True)[0]
    assert (len(cut), cut[0], cut[-1]) == (128, 2, 3)
    assert np.isfinite(embedder.embed([cut])).all()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_model_that_writes_makes_the_same_vectors_alone_and_among_others(writer: Engine, pooling: Pooling) -> None:
    texts = ["The class statement", "An exception is raised when", "x", "The import statement " * 30]
    together = writer.embed(texts, pooling=pooling)
    alone = np.concatenate([writer.embed([text], pooling=pooling) for text in texts])
    assert np.abs(together - alone).max() < 2e-3  # this model's weights are quantized: rows in fours, see prefix.py
    assert (together @ alone.T).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_model_that_writes_is_pooled_by_its_last_token_unless_told(writer: Engine) -> None:
    texts = ["The class statement"]
    assert np.array_equal(writer.embed(texts), writer.embed(texts, pooling="last"))


def test_vectors_do_not_touch_the_conversation(writer: Engine) -> None:
    context = writer.context
    prompt = writer.tokenize("The class statement defines " * 8)
    context.reuse(prompt)
    context.decode_prompt(prompt, None)
    writer.embed(["something else"])
    assert context.cached == prompt
    assert context.reuse([*prompt, 5]) == len(prompt) // 4 * 4


def test_hybrid_model_embeds_one_text_after_the_other(toolchain: Toolchain, tmp_path: Path) -> None:
    path = write_model(tmp_path / "lfm2.gguf", "lfm2", random=True)
    with load(path, settings_with(n_ctx=512)) as engine:
        together = engine.embed(TEXTS, pooling="mean")
        alone = np.concatenate([engine.embed([text], pooling="mean") for text in TEXTS])
        assert np.abs(together - alone).max() < 1e-4


def run(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    return subprocess.run(
        [sys.executable, "-m", "runtime", *map(str, arguments)],
        input=given,
        env={**environment, "PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_each_line_of_input_becomes_a_line_of_output(bert: Path, embedder: Embedder) -> None:
    done = run("embed", bert, given="\n".join(TEXTS) + "\n")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert np.abs(np.array(rows) - embedder.embed(embedder.tokenize(TEXTS))).max() < 1e-6
    assert done.stderr == ""


def test_json_tells_the_pooling_and_the_tokens(bert: Path) -> None:
    done = run("embed", bert, "-p", "the cat", "-p", "dog", "--json", "--pooling", "cls")
    found = json.loads(done.stdout)
    assert (len(found["embeddings"]), found["n_embd"]) == (2, N_EMBD)
    assert (found["pooling"], found["tokens"]) == ("cls", [4, 3])


def test_too_long_text_ends_with_code_2_and_says_which(bert: Path) -> None:
    done = run("embed", bert, given="dog\n" + "cat " * 200 + "\n")
    assert done.returncode == 2
    assert "text 2 has 202 tokens" in done.stderr
    assert "--truncate" in done.stderr


def test_reranker_is_refused_and_bert_writes_no_text(bert: Path, tmp_path: Path) -> None:
    ranker = write_bert(tmp_path / "ranker.gguf", pooling=gguf.PoolingType.RANK)
    assert "is a reranker" in run("embed", ranker, "-p", "x").stderr
    assert "is an embedding model" in run("complete", bert, "-p", "x").stderr


def started(*arguments: object) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "runtime", *map(str, arguments)],
        env={**environment, "PYTHONPATH": str(PROJECT_ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_line_is_answered_at_once_and_ctrl_c_ends_the_waiting(bert: Path) -> None:
    with started("embed", bert) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write("the cat\n")
        child.stdin.flush()
        assert len(json.loads(child.stdout.readline())) == N_EMBD
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 130


def test_option_that_vectors_ignore_is_not_offered(bert: Path) -> None:
    for option in ("--type-k", "--n-ubatch"):
        done = run("embed", bert, "-p", "x", option, "512")
        assert (done.returncode, "unrecognized arguments" in done.stderr) == (2, True)


def test_context_that_does_not_fit_is_refused_before_it_is_made(bert: Path) -> None:
    arguments = argparse.Namespace(model=str(bert), no_tune=True, lora=[], n_ctx=N_CTX)
    found = prepare(request_of(arguments), "embeddings")
    check_room(found, 128, 64)
    small = tuple(replace(device, free_bytes=device.margin_bytes + 1000) for device in found.planned.devices)
    with pytest.raises(MemoryFitError, match="texts of 128 tokens do not fit") as caught:
        check_room(replace(found, planned=replace(found.planned, devices=small)), 128, 64)
    assert "--n-ctx" in caught.value.hint
