"""Images in prompts: small vision parts of random weights, on the real libmtmd."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.engine.images import decode_image
from runtime.engine.load import load
from runtime.engine.reply import ReplyStats
from runtime.engine.sampling import SamplingOptions
from runtime.engine.seen import Seen
from runtime.interrupts import Interrupt
from runtime.settings import Settings, settle
from tests.front_door import runtime
from tests.generated_vision import (
    N_TOKENS,
    Kind,
    picture,
    write_gemma3,
    write_mmproj,
    write_qwen2vl,
    write_text_model,
)
from tests.loopback_hub import serve_hub
from toolchain.base import machine
from toolchain.base.errors import UsageError
from toolchain.base.files import PROJECT_ROOT
from toolchain.build.toolchain import Toolchain

GREEDY = SamplingOptions(temp=0.0)
KINDS: dict[str, tuple[Callable[[Path], Path], Kind]] = {
    "llama": (write_text_model, "mlp"),
    "qwen": (write_qwen2vl, "qwen2vl_merger"),
    "gemma": (write_gemma3, "gemma3"),
}
CAT, DOG = picture("cat"), picture("dog")


def settings_with(**flags: int) -> Settings:
    return settle(machine=machine.probe(), n_ctx_train=None, flags={"n_ctx": 256, "n_gpu_layers": 0, **flags})


@pytest.fixture(scope="module")
def models(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of ``KINDS`` in a folder with its vision part."""
    place = tmp_path_factory.mktemp("vision")
    for name, (write, kind) in KINDS.items():
        folder = place / name
        folder.mkdir()
        write(folder / f"{name}.gguf")
        write_mmproj(folder / f"mmproj-{name}.gguf", 64, kind=kind)
    return place


def seeing(models: Path, name: str, **flags: int) -> Engine:
    engine = load(models / name / f"{name}.gguf", settings_with(**flags))
    engine.open_vision(models / name / f"mmproj-{name}.gguf")
    return engine


@pytest.fixture(params=KINDS)
def engine(models: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with seeing(models, request.param) as opened:
        yield opened


@pytest.fixture
def llama(models: Path) -> Iterator[Engine]:
    with seeing(models, "llama") as opened:
        yield opened


def see(engine: Engine, prompt: str, *images: bytes) -> Seen:
    """``#`` stands for an image."""
    return engine.see(prompt.replace("#", engine.image_marker), images)


def reply(engine: Engine, prompt: Seen | list[int], tokens: int = 12) -> tuple[str, ReplyStats]:
    chunks = list(engine.stream(prompt, GREEDY, max_tokens=tokens))
    stats = chunks[-1].stats
    assert stats is not None
    return "".join(chunk.text for chunk in chunks), stats


def test_a_reply_depends_on_the_image_and_is_the_same_for_the_same_one(engine: Engine) -> None:
    cat, dog = (picture(name, width=112, height=112) for name in ("cat", "dog"))
    texts, rows = [], []
    for image in (cat, dog, cat):
        engine.context.clear()
        rows.append(after(engine, see(engine, "look # and say", image)))
        texts.append(reply(engine, see(engine, "look # and say", image))[0])
    assert texts[0] == texts[2]
    assert np.array_equal(rows[0], rows[2])
    words = after(engine, engine.tokenize("look  and say"))
    for left, right in ((rows[0], rows[1]), (rows[0], words), (rows[1], words)):
        assert np.abs(left - right).max() > 0.1


def after(engine: Engine, prompt: Seen | list[int]) -> np.ndarray:
    """The logits that follow ``prompt``."""
    reply(engine, prompt, tokens=0)
    return logits_of(engine, engine.context.handle)


def test_prompt_is_what_the_librarys_own_helper_makes_of_it(engine: Engine, models: Path) -> None:
    """Logits after the prompt, of ``mtmd_helper_eval_chunks`` on a context of its own and of ours."""
    import llama_cpp.mtmd_cpp as mtmd

    prompt = "look # and # again"
    seen = see(engine, prompt, CAT, DOG)
    ours = after(engine, seen)
    lib, vision = engine.model.lib, engine._vision
    assert vision is not None
    raw = ("<s>" + prompt.replace("#", engine.image_marker)).encode()
    text = mtmd.mtmd_input_text(text=raw, text_len=len(raw), add_special=False, parse_special=True)
    bitmaps = (ctypes.c_void_p * 2)(*(vision._bitmap(decode_image(image)) for image in (CAT, DOG)))
    chunks = mtmd.mtmd_input_chunks_init()
    params = lib.llama_context_default_params()
    params.n_ctx = 256
    theirs = lib.llama_init_from_model(engine.model.handle, params)
    try:
        assert mtmd.mtmd_tokenize(vision._handle, chunks, ctypes.byref(text), bitmaps, 2) == 0
        assert mtmd.mtmd_helper_get_n_tokens(chunks) == seen.n_tokens
        assert mtmd.mtmd_helper_get_n_pos(chunks) == len(seen.tokens)
        reached = ctypes.c_int32()
        arguments = (chunks, 0, 0, 512, True, ctypes.byref(reached))
        assert mtmd.mtmd_helper_eval_chunks(vision._handle, theirs, *arguments) == 0
        np.testing.assert_allclose(ours, logits_of(engine, theirs), atol=2e-2)
    finally:
        lib.llama_free(theirs)
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)


def logits_of(engine: Engine, context: Any) -> np.ndarray:
    row = engine.model.lib.llama_get_logits_ith(context, -1)
    return np.array(np.ctypeslib.as_array(row, (engine.model.n_vocab,)))


def test_an_image_that_was_seen_is_kept_and_another_is_not_taken_for_it(engine: Engine) -> None:
    first, stats = reply(engine, see(engine, "look # and say", CAT))
    assert stats.cached_tokens == 0
    again, stats = reply(engine, see(engine, "look # and say", CAT))
    assert (again, stats.processed_tokens) == (first, 1)
    longer, stats = reply(engine, see(engine, "look # and say more", CAT))
    assert stats.cached_tokens > N_TOKENS
    assert stats.cached_tokens + stats.processed_tokens == stats.prompt_tokens
    seen = see(engine, "look # and say more", DOG)
    other, stats = reply(engine, seen)
    assert stats.cached_tokens <= seen.spans[0].start
    engine.context.clear()
    assert reply(engine, see(engine, "look # and say more", DOG))[0] == other
    engine.context.clear()
    assert reply(engine, see(engine, "look # and say more", CAT))[0] == longer


def test_words_after_an_image_are_answered_as_if_it_had_not_been(engine: Engine) -> None:
    words = engine.tokenize("look and say")
    cold, _ = reply(engine, words)
    reply(engine, see(engine, "look # and say", CAT))
    assert reply(engine, words)[0] == cold
    assert min(engine.context.cached) >= 0


def test_two_images_stand_in_their_order(engine: Engine) -> None:
    marker = engine.image_marker
    prompt = f"first {marker} second {marker} end"
    both = [engine.see(prompt, pair).tokens for pair in ((CAT, DOG), (DOG, CAT), (CAT, CAT))]
    assert both[0] != both[1] != both[2]
    assert [len(each) for each in both] == [len(both[0])] * 3
    first, other = (after(engine, engine.see(prompt, pair)) for pair in ((CAT, DOG), (DOG, CAT)))
    assert np.abs(first - other).max() > 0.1


def test_an_interrupt_before_the_image_leaves_a_cache_that_is_right(engine: Engine) -> None:
    seen = see(engine, "look # and say", CAT)
    whole, _ = reply(engine, seen)
    engine.context.clear()
    interrupt = Interrupt()
    interrupt.raised = True
    stats = list(engine.stream(seen, GREEDY, max_tokens=12, interrupt=interrupt))[-1].stats
    assert stats is not None
    assert stats.finish_reason == "cancelled"
    assert len(engine.context.cached) <= seen.spans[0].start
    assert reply(engine, seen)[0] == whole


def test_several_prompts_together_are_answered_after_an_image(engine: Engine) -> None:
    prompts = [engine.tokenize(text) for text in ("look and say", "look and hear")]
    cold = collected(engine, prompts)
    reply(engine, see(engine, "look # and say", CAT))
    assert collected(engine, prompts) == cold


def collected(engine: Engine, prompts: list[list[int]]) -> dict[int, str]:
    texts = dict.fromkeys(range(len(prompts)), "")
    for index, chunk in engine.stream_many(prompts, GREEDY, max_tokens=8):
        texts[index] += chunk.text
    return texts


def test_counting_tells_what_the_prompt_takes(engine: Engine) -> None:
    for prompt, images in (("look # and # say", (CAT, DOG)), ("# say", (CAT,)), ("say", ())):
        marked = prompt.replace("#", engine.image_marker)
        seen = engine.see(marked, images)
        assert engine.count_seen(marked, images) == seen.n_tokens
        assert reply(engine, seen, tokens=1)[1].prompt_tokens == seen.n_tokens


def test_bos_stands_before_an_image_that_comes_first(llama: Engine) -> None:
    assert see(llama, "# say", CAT).tokens[0] == llama.tokenize("")[0]
    assert see(llama, "say # it", CAT).tokens[: len(llama.tokenize("say"))] == llama.tokenize("say")


def test_a_session_with_an_image_is_restored_without_reading_it_again(
    engine: Engine, models: Path, tmp_path: Path
) -> None:
    seen = see(engine, "look # and say", CAT)
    text, _ = reply(engine, seen)
    engine.save_session(tmp_path / "talk.session")
    engine.context.clear()
    engine.restore_session(tmp_path / "talk.session")
    again, stats = reply(engine, see(engine, "look # and say", CAT))
    assert again == text
    assert stats.cached_tokens >= seen.cells(seen.spans[-1].end)


def test_where_a_sessions_state_cannot_be_used_the_words_before_the_image_are_read_again(
    llama: Engine, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reply(llama, see(llama, "look # and say", CAT))
    llama.save_session(tmp_path / "talk.session")
    other = settle(
        machine=machine.probe(),
        n_ctx_train=None,
        flags={"n_ctx": 256, "n_gpu_layers": 0, "type_k": "f32", "type_v": "f32"},
    )
    with load(models / "llama/llama.gguf", other) as engine:
        assert 0 < engine.restore_session(tmp_path / "talk.session") < N_TOKENS
        assert min(engine.context.cached) >= 0
        assert "reading the first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "images", "why"),
    [
        ("look # and say", (b"words",), "no image"),
        ("look # and say", (CAT[:-40],), "cannot be read"),
        ("look # and say", (), "room for 1 images, and 0"),
        ("look and say", (CAT,), "room for 0 images, and 1"),
        ("look #", (CAT,), "ends in words"),
    ],
)
def test_what_cannot_be_seen_is_a_usage_error_and_the_engine_goes_on(
    llama: Engine, prompt: str, images: tuple[bytes, ...], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        see(llama, prompt, *images)
    assert reply(llama, see(llama, "look # and say", CAT))[0]


def test_a_prompt_that_is_longer_than_the_context_counts_its_images(models: Path) -> None:
    with seeing(models, "llama", n_ctx=24) as engine:
        seen = see(engine, "look # and say", CAT)
        with pytest.raises(UsageError, match=f"{seen.n_tokens} tokens, the context holds 24"):
            reply(engine, seen)


def test_a_large_photograph_is_made_smaller_until_it_leaves_half_of_the_context(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = picture("photo", kind="JPEG", width=1600, height=1200)
    with seeing(models, "qwen") as engine:
        marked = f"look {engine.image_marker} and say"
        seen = engine.see(marked, [photo])
        assert N_TOKENS < seen.n_tokens - len(seen.text_tokens) <= engine.n_ctx // 2
        assert "an image of 1600 x 1200 pixels is read at" in capsys.readouterr().err
        assert engine.count_seen(marked, [photo]) == seen.n_tokens
        assert reply(engine, seen)[0]


def test_micro_batches_smaller_than_an_image_do_not_change_the_reply(models: Path, llama: Engine) -> None:
    with seeing(models, "llama", n_batch=5, n_ubatch=5) as engine:
        assert (
            reply(engine, see(engine, "look # and say", CAT))[0] == reply(llama, see(llama, "look # and say", CAT))[0]
        )


def test_an_image_that_is_read_in_one_piece_needs_a_micro_batch_for_it(models: Path) -> None:
    """The library would end the program."""
    with seeing(models, "gemma", n_batch=8, n_ubatch=8) as engine:
        with pytest.raises(UsageError, match=f"in one piece, of {N_TOKENS} tokens; a micro-batch has 8") as caught:
            reply(engine, see(engine, "look # and say", CAT))
        assert "--n-ubatch 256" in caught.value.hint
        assert reply(engine, engine.tokenize("look"))[0]


def test_a_model_without_a_vision_part_says_that_it_does_not_see(models: Path) -> None:
    with load(models / "llama/llama.gguf", settings_with()) as engine:
        assert not engine.sees
        with pytest.raises(UsageError, match=r"llama\.gguf does not see") as caught:
            engine.see("look", [CAT])
        assert "--mmproj" in caught.value.hint


def test_a_vision_part_of_another_model_is_refused_and_the_model_still_writes(models: Path, tmp_path: Path) -> None:
    other = write_mmproj(tmp_path / "mmproj-other.gguf", 128)
    with load(models / "llama/llama.gguf", settings_with()) as engine:
        with pytest.raises(UsageError, match="vision part of another model"):
            engine.open_vision(other)
        assert reply(engine, engine.tokenize("say"))[0]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    return {**clean, "FOUNDRY_HOME": str(tmp_path / "home"), "FOUNDRY_NO_TUNE": "1", "TERM": "dumb"}


def complete(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return briefly(environment, "complete", *arguments)


def briefly(
    environment: dict[str, str], verb: str, *arguments: object, given: str = ""
) -> subprocess.CompletedProcess[str]:
    return runtime(environment, verb, *arguments, "-n", "8", "--temp", "0", given=given, cwd=PROJECT_ROOT)


def test_complete_looks_at_an_image_with_the_vision_part_beside_the_model(
    environment: dict[str, str], models: Path, tmp_path: Path
) -> None:
    paths = {}
    for name, raw in (("cat", CAT), ("dog", DOG)):
        paths[name] = tmp_path / f"{name}.png"
        paths[name].write_bytes(raw)
    model = models / "llama/llama.gguf"
    replies = {}
    for name, path in paths.items():
        done = complete(environment, model, "--image", path, "-p", "say", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        replies[name] = found["text"]
        assert found["prompt_tokens"] > N_TOKENS
    assert replies["cat"] != replies["dog"]


def test_a_vision_part_comes_with_its_model_from_the_hub_where_images_are_asked_about(
    environment: dict[str, str], models: Path, tmp_path: Path
) -> None:
    held, image = tmp_path / "held", tmp_path / "cat.png"
    held.mkdir()
    shutil.copy(models / "llama/llama.gguf", held / "eye-Q8_0.gguf")
    for kind in ("f16", "q8_0"):
        shutil.copy(models / "llama/mmproj-llama.gguf", held / f"mmproj-eye-{kind}.gguf")
    image.write_bytes(CAT)
    own = {**environment, "HF_HOME": str(tmp_path / "hf")}
    with serve_hub({"acme/eye": held}) as hub:
        own["HF_ENDPOINT"] = hub.url
        words = briefly(own, "complete", "acme/eye", "-p", "say")
        assert "mmproj" not in words.stderr
        first = briefly(own, "complete", "acme/eye", "--image", image, "-p", "say")
    assert first.returncode == 0, first.stderr
    assert "fetch acme/eye mmproj-eye-f16.gguf" in first.stderr
    again = briefly(own, "complete", "acme/eye", "--image", image, "-p", "say")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert "fetch" not in again.stderr
    assert words.stdout != first.stdout
    blind = briefly(own, "complete", "acme/eye", "--image", image, "-p", "say", "--no-mmproj")
    assert blind.returncode == 2
    assert "does not see" in blind.stderr


def test_chat_looks_at_an_image_and_remembers_it_in_the_next_turn(
    environment: dict[str, str], tmp_path: Path, toolchain: Toolchain
) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    model = write_text_model(tmp_path / "eye.gguf", template=template)
    write_mmproj(tmp_path / "mmproj-eye.gguf", 64)
    said = {}
    for name, raw in (("cat", CAT), ("dog", DOG)):
        (tmp_path / f"{name}.png").write_bytes(raw)
        done = briefly(environment, "chat", model, given=f"/image {tmp_path / name}.png what\nand now\n")
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
        first, then = re.findall(r"prompt tokens \((\d+) cached\)", done.stderr)
        assert int(first) == 0
        assert int(then) > N_TOKENS
    assert said["cat"] != said["dog"]


def test_complete_refuses_what_it_cannot_look_at_before_the_model_is_loaded(
    environment: dict[str, str], models: Path, tmp_path: Path
) -> None:
    image, words, blind = tmp_path / "cat.png", tmp_path / "cat.txt", tmp_path / "blind.gguf"
    image.write_bytes(CAT)
    words.write_text("meow")
    blind.symlink_to(models / "llama/llama.gguf")
    model = models / "llama/llama.gguf"
    for arguments, why in (
        ((model, "--image", words), "this is no image that a model takes"),
        ((model, "--image", tmp_path / "gone.png"), "cannot be read"),
        ((blind, "--image", image), "blind.gguf does not see"),
        ((model, "--image", image, "--mmproj", blind), "--mmproj: blind.gguf is no vision or audio part"),
    ):
        done = complete(environment, *arguments, "-p", "say")
        assert done.returncode == 2, done.stderr
        assert why in done.stderr
        assert "→" in done.stderr
        assert done.stdout == ""
