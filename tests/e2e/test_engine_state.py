"""What the engine remembers, on the real library: prefixes, sessions, adapters. Models are generated or the demo's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from runtime.engine import Engine
from runtime.engine import session as sessions
from runtime.engine.load import load
from runtime.settings import settle
from tests.generated_models import write_model
from toolchain.base import machine
from toolchain.base.errors import ArtifactError, MissingError, UsageError
from toolchain.base.files import PROJECT_ROOT
from toolchain.build.toolchain import Toolchain

Logits = npt.NDArray[np.float32]
HERE = machine.probe()


def engine_for(path: Path, **flags: int | str) -> Engine:
    flags = {"n_ctx": 2048, "n_gpu_layers": 0, "n_threads": 2, "n_threads_batch": 2, **flags}
    return load(path, settle(machine=HERE, n_ctx_train=None, flags=flags))


def logits_after(engine: Engine, tokens: Sequence[int]) -> tuple[Logits, int]:
    """The logits that follow ``tokens``, and how many of those were taken from the cache."""
    context, lib = engine.context, engine.model.lib
    reused = context.reuse(tokens)
    assert context.decode_prompt(tokens, None)
    assert context.cached == list(tokens)
    row = lib.llama_get_logits_ith(context.handle, -1)
    return np.ctypeslib.as_array(row, (engine.model.n_vocab,)).copy(), reused


def say(engine: Engine, tokens: Sequence[int], count: int) -> list[int]:
    """A greedy reply of ``count`` tokens; they end up in the cache as those of a reply do."""
    context, lib = engine.context, engine.model.lib
    reply: list[int] = []
    row, _ = logits_after(engine, tokens)
    while len(reply) < count:
        reply.append(int(row.argmax()))
        one = (lib.llama_token * 1)(reply[-1])
        assert lib.llama_decode(context.handle, lib.llama_batch_get_one(one, 1)) == 0
        context.cached.append(reply[-1])
        row = np.ctypeslib.as_array(lib.llama_get_logits_ith(context.handle, -1), (engine.model.n_vocab,))
    return reply


def prompt_of(engine: Engine, length: int, *, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, engine.model.n_vocab, length).tolist()
    return tokens


@pytest.fixture(scope="module")
def models(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models whose caches differ: plain, a sliding window of 128 tokens, two hybrids."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": write_model(folder / "llama.gguf", "llama", random=True),
        "other": write_model(folder / "other.gguf", "llama", random=True, seed=1),
        "gemma3": write_model(folder / "gemma3.gguf", "gemma3", random=True, window=128, n_layer=6),
        "lfm2": write_model(folder / "lfm2.gguf", "lfm2", random=True),
        "granitehybrid": write_model(folder / "granitehybrid.gguf", "granitehybrid", random=True),
    }


@pytest.fixture(scope="module")
def llama(models: dict[str, Path]) -> Iterator[Engine]:
    with engine_for(models["llama"]) as engine:
        yield engine


@pytest.mark.parametrize(
    ("length", "shared"),
    [(1000, 950), (1000, 999), (1000, 512), (1000, 500), (1000, 3), (540, 539), (513, 512), (60, 59), (60, 20)],
)
def test_warm_prompt_has_the_bits_of_a_cold_one(demo_gguf: Path, length: int, shared: int) -> None:
    with engine_for(demo_gguf) as engine:
        prompt = prompt_of(engine, length)
        cold, reused = logits_after(engine, prompt)
        assert reused == 0
        logits_after(engine, [*prompt[:shared], *prompt_of(engine, 300, seed=1)])
        warm, reused = logits_after(engine, prompt)
        assert np.array_equal(warm, cold)
        assert reused >= shared - 80 or shared // 512 != (length - 1) // 512


def test_cache_longer_than_the_prompt_is_cut(llama: Engine) -> None:
    prompt = prompt_of(llama, 400)
    cold, _ = logits_after(llama, prompt)
    logits_after(llama, [*prompt, *prompt_of(llama, 200, seed=1)])
    warm, reused = logits_after(llama, prompt)
    assert reused == 336
    assert np.array_equal(warm, cold)


def test_reply_is_not_read_again(llama: Engine) -> None:
    prompt = prompt_of(llama, 100, seed=2)
    reply = say(llama, prompt, 20)
    assert logits_after(llama, [*prompt, *reply, 5])[1] == 120


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2", "granitehybrid"])
def test_every_kind_of_cache_gives_the_reply_of_a_cold_run(models: dict[str, Path], family: str) -> None:
    """Continued, cut by a little, cut by much, cut in the middle: whatever is kept, the text is that of nothing."""
    with engine_for(models[family]) as engine, engine_for(models[family]) as cold:
        first = prompt_of(engine, 900)
        reply = say(engine, first, 8)
        prompts = [
            [*first, *reply, *prompt_of(engine, 50, seed=1)],
            [*first[:880], *prompt_of(engine, 40, seed=2)],
            [*first[:100], *prompt_of(engine, 300, seed=3)],
            first[:64],
            first,
        ]
        for prompt in prompts:
            cold.context.clear()
            assert say(engine, prompt, 8) == say(cold, prompt, 8)


def test_sliding_window_keeps_what_it_can_still_see(models: dict[str, Path]) -> None:
    with engine_for(models["gemma3"], n_batch=64, n_ubatch=64) as engine:
        prompt = prompt_of(engine, 1000)
        near = [*prompt[:970], *prompt_of(engine, 30, seed=1)]
        cold, _ = logits_after(engine, near)
        logits_after(engine, prompt)
        warm, reused = logits_after(engine, near)
        assert reused == 968
        assert warm.argmax() == cold.argmax()
        assert logits_after(engine, [*prompt[:300], 7, 8, 9])[1] == 0  # the window has left it behind


def test_sliding_window_that_moved_on_goes_back_to_a_checkpoint(models: dict[str, Path]) -> None:
    with engine_for(models["gemma3"], n_batch=64, n_ubatch=64) as engine:
        prompt = prompt_of(engine, 700)
        cold, _ = logits_after(engine, prompt)
        say(engine, prompt, 400)
        warm, reused = logits_after(engine, prompt)
        assert reused == 636
        assert np.allclose(warm, cold, atol=0.02)  # its cells lie elsewhere, and are summed in another order


@pytest.mark.parametrize("family", ["lfm2", "granitehybrid"])
def test_recurrent_model_goes_back_to_a_checkpoint(models: dict[str, Path], family: str) -> None:
    with engine_for(models[family]) as engine:
        prompt = prompt_of(engine, 700)
        cold, _ = logits_after(engine, prompt)
        say(engine, prompt, 10)
        warm, reused = logits_after(engine, prompt)
        assert reused == 636
        assert np.array_equal(warm, cold)
        assert logits_after(engine, [*prompt, 5, 6])[1] == 700  # going on needs no checkpoint


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2", "granitehybrid"])
def test_restored_session_goes_on_as_the_saved_one(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    path = tmp_path / "talk.session"
    with engine_for(models[family]) as engine:
        prompt = prompt_of(engine, 500)
        reply = say(engine, prompt, 8)
        engine.save_session(path, {"turns": ["hello"]})
        more = [*prompt, *reply, *prompt_of(engine, 30, seed=1)]
        expected = logits_after(engine, more)[0]
    assert path.stat().st_mode & 0o777 == 0o600
    assert sessions.read(path).note == {"turns": ["hello"]}
    with engine_for(models[family]) as engine:
        assert engine.restore_session(path) == 508
        found, reused = logits_after(engine, more)
        assert reused == 508
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_restored_prompt_asked_again_has_the_bits_of_a_cold_run(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    path = tmp_path / "prompt.session"
    with engine_for(models[family]) as engine:
        prompt = prompt_of(engine, 500)
        cold, _ = logits_after(engine, prompt)
        engine.save_session(path)
    with engine_for(models[family]) as engine:
        engine.restore_session(path)
        warm, reused = logits_after(engine, prompt)
        assert reused >= 432
        assert np.array_equal(warm, cold)


@pytest.fixture(scope="module")
def saved(llama: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "some.session"
    logits_after(llama, prompt_of(llama, 200))
    llama.save_session(path)
    return path


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.99999])
def test_truncated_session_is_refused(llama: Engine, saved: Path, tmp_path: Path, part: float) -> None:
    path = tmp_path / "short.session"
    path.write_bytes(saved.read_bytes()[: int(saved.stat().st_size * part)])
    with pytest.raises((ArtifactError, UsageError), match=r"damaged|not a session"):
        llama.restore_session(path)


@pytest.mark.parametrize("place", [5, 30, 5000, -300, -80, -40, -20])
def test_flipped_bit_is_refused_and_the_cache_stays(llama: Engine, saved: Path, tmp_path: Path, place: int) -> None:
    raw = bytearray(saved.read_bytes())
    raw[place] ^= 4
    path = tmp_path / "rotten.session"
    path.write_bytes(raw)
    prompt = prompt_of(llama, 80, seed=5)
    logits_after(llama, prompt)
    with pytest.raises((ArtifactError, UsageError)):
        llama.restore_session(path)
    assert llama.context.cached == prompt


def test_session_of_another_model_is_refused(models: dict[str, Path], saved: Path) -> None:
    with engine_for(models["other"]) as engine, pytest.raises(UsageError, match="another model") as refused:
        engine.restore_session(saved)
    assert "llama.gguf" in refused.value.hint


def test_session_longer_than_the_context_is_refused(models: dict[str, Path], saved: Path) -> None:
    with engine_for(models["llama"], n_ctx=64) as engine, pytest.raises(UsageError, match="200 tokens, the context 64"):
        engine.restore_session(saved)


def test_session_with_another_cache_type_is_read_again_with_a_warning(
    models: dict[str, Path], saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine_for(models["llama"], type_k="q8_0", type_v="q8_0") as engine:
        assert engine.restore_session(saved) == 200
        assert "f16/f16, this one q8_0/q8_0" in capsys.readouterr().err
        expected = logits_after(engine, prompt_of(engine, 200))[0]
        engine.context.clear()
        assert np.array_equal(expected, logits_after(engine, prompt_of(engine, 200))[0])


def test_session_of_another_build_is_read_again_with_a_warning(
    llama: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama.model, "build", "another")
    assert llama.restore_session(saved) == 200
    assert "another build" in capsys.readouterr().err


def test_session_of_another_library_with_the_same_version_is_not_handed_over(
    models: dict[str, Path],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with engine_for(models["llama"]) as engine:
        assert engine.restore_session(saved) == 200
        assert capsys.readouterr().err == ""
    (tmp_path / "libllama.so").write_bytes(b"another build")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with engine_for(models["llama"]) as engine:
        assert engine.restore_session(saved) == 200
        assert "another build" in capsys.readouterr().err


def test_nothing_is_left_when_a_session_cannot_be_written(llama: Engine, tmp_path: Path) -> None:
    logits_after(llama, prompt_of(llama, 20))
    with pytest.raises(MissingError):
        llama.save_session(Path("/proc/some.session"))
    llama.context.clear()
    with pytest.raises(UsageError, match="nothing to save"):
        llama.save_session(tmp_path / "empty.session")
    assert list(tmp_path.iterdir()) == []


RANK, ALPHA = 4, 8.0
TARGETS = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.3.attn_output.weight")


def write_adapter(
    path: Path, base: Path, targets: Sequence[str] = TARGETS, *, seed: int = 0, size: float = 0.2, **changes: Any
) -> dict[str, Logits]:
    """A LoRA for ``base``; the change of each weight that it stands for at scale 1."""
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in gguf.GGUFReader(base).tensors}
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_type(changes.get("type", "adapter"))
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    if changes.get("alora"):
        writer.add_array("adapter.alora.invocation_tokens", [5, 6])
    numbers, deltas = np.random.default_rng(seed), {}
    for target in targets:
        width, rows = shapes.get(target, (256, 256))
        a = numbers.standard_normal((RANK, width), np.float32) * np.float32(size)
        b = numbers.standard_normal((rows + changes.get("wider", 0), RANK), np.float32) * np.float32(size)
        turned = target == "token_embd.weight"  # its halves stand the other way round
        writer.add_tensor(f"{target}.lora_a", np.ascontiguousarray(b) if turned else a)
        writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(a.T) if turned else b)
        deltas[target] = b @ a * np.float32(ALPHA / RANK)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return deltas


def merged(base: Path, path: Path, deltas: dict[str, Logits], scale: float) -> Path:
    """``base``, whose weights are f32, with ``scale`` times the deltas added in place."""
    shutil.copy(base, path)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name in deltas:
            tensor.data[:] += np.float32(scale) * deltas[tensor.name]
    return path


@pytest.fixture(scope="module")
def base(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base.gguf", "llama", type="f32", random=True)


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_adapter_at_its_scale_equals_merged_weights(base: Path, tmp_path: Path, scale: float) -> None:
    deltas = write_adapter(tmp_path / "adapter.gguf", base)
    with engine_for(merged(base, tmp_path / "merged.gguf", deltas, scale)) as engine:
        expected, _ = logits_after(engine, prompt_of(engine, 70))
    with engine_for(base) as engine:
        plain, _ = logits_after(engine, prompt_of(engine, 70))
        engine.set_adapters([(engine.load_adapter(tmp_path / "adapter.gguf"), scale)])
        found, reused = logits_after(engine, prompt_of(engine, 70))
    assert reused == 0
    assert np.abs(plain - expected).max() > 0.05
    assert np.abs(found - expected).max() < 2e-3


def test_adapters_add_up_and_switch_without_a_reload(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one.gguf", base)
    write_adapter(tmp_path / "two.gguf", base, seed=1)
    with engine_for(base) as engine:
        prompt = prompt_of(engine, 70)
        one, two = (engine.load_adapter(tmp_path / name) for name in ("one.gguf", "two.gguf"))
        plain = logits_after(engine, prompt)[0]
        seen = []
        for chosen in ([(one, 1.0)], [(two, 1.0)], [(one, 1.0), (two, 0.5)], [(two, 0.5), (one, 0.5), (one, 0.5)]):
            engine.set_adapters(chosen)
            seen.append(logits_after(engine, prompt)[0])
        assert not np.allclose(seen[0], seen[1], atol=1e-3)
        assert np.allclose(seen[2], seen[3], atol=1e-3)
        engine.set_adapters([(one, 0.0)])
        assert np.array_equal(logits_after(engine, prompt)[0], plain)


def test_same_adapters_keep_the_cache(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one.gguf", base)
    with engine_for(base) as engine:
        one = engine.load_adapter(tmp_path / "one.gguf")
        engine.set_adapters([(one, 1.0)])
        logits_after(engine, prompt_of(engine, 70))
        engine.set_adapters([(one, 1.0)])
        assert len(engine.context.cached) == 70


def test_session_with_other_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one.gguf", base)
    with engine_for(base) as engine:
        one = engine.load_adapter(tmp_path / "one.gguf")
        engine.set_adapters([(one, 0.5)])
        prompt = prompt_of(engine, 70)
        expected, _ = logits_after(engine, prompt)
        engine.save_session(tmp_path / "talk.session")
        engine.set_adapters([(one, 1.0)])
        with pytest.raises(UsageError, match="other LoRA adapters"):
            engine.restore_session(tmp_path / "talk.session")
        engine.set_adapters([(one, 0.5)])
        assert engine.restore_session(tmp_path / "talk.session") == 70
        assert np.array_equal(logits_after(engine, prompt)[0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "model"}, "is not a LoRA adapter"),
        ({"architecture": "qwen2"}, "an adapter for qwen2, the model is llama"),
        ({"alora": True}, "activated LoRA"),
        ({"targets": ["blk.9.attn_q.weight"]}, r"changes blk.9.attn_q.weight, which the model does not have"),
        ({"wider": 1}, r"does not fit blk.0.attn_q.weight"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_before_the_library_sees_it(
    base: Path, llama: Engine, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_adapter(tmp_path / "bad.gguf", base, **changes)
    with pytest.raises((UsageError, ArtifactError), match=message):
        llama.load_adapter(tmp_path / "bad.gguf")


def test_adapter_of_an_embedding_works_unless_it_is_the_output_too(
    models: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    deltas = write_adapter(tmp_path / "embedding.gguf", base, ["token_embd.weight"])
    with engine_for(merged(base, tmp_path / "merged.gguf", deltas, 1.0)) as engine:
        expected, _ = logits_after(engine, prompt_of(engine, 70))
    with engine_for(base) as engine:
        engine.set_adapters([(engine.load_adapter(tmp_path / "embedding.gguf"), 1.0)])
        assert np.abs(logits_after(engine, prompt_of(engine, 70))[0] - expected).max() < 2e-3
    tied = write_model(tmp_path / "tied.gguf", "llama-tied", random=True)
    with engine_for(tied) as engine, pytest.raises(ArtifactError, match="the output's matrix too"):
        engine.load_adapter(tmp_path / "embedding.gguf")


def test_truncated_adapter_is_refused(base: Path, llama: Engine, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    write_adapter(path, base)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ArtifactError):
        llama.load_adapter(path)


def test_adapter_without_effect_is_noticed(base: Path, llama: Engine, tmp_path: Path) -> None:
    write_adapter(tmp_path / "zero.gguf", base, size=0.0)
    write_adapter(tmp_path / "empty.gguf", base, [])
    assert "all of its deltas are zero" in llama.load_adapter(tmp_path / "zero.gguf").file.effect
    assert llama.load_adapter(tmp_path / "empty.gguf").file.effect == "changes no tensor"


def complete(model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "runtime", "complete", model, "-p", "w1 w2 w3", "-n", 12, "--temp", 0, "--no-stats"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    return subprocess.run(
        [*map(str, argv), "--n-ctx", "256", *map(str, arguments)],
        env={**environment, "PYTHONPATH": str(PROJECT_ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        text=True,
        errors="replace",
        check=False,
    )


def test_adapters_of_the_command_line_work_at_their_scales(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    deltas = write_adapter(adapter, base)
    plain, off, half = (complete(base, *more) for more in ((), ("--lora", f"{adapter}=0"), ("--lora", f"{adapter}=.5")))
    assert (plain.returncode, off.returncode, half.returncode) == (0, 0, 0), plain.stderr + off.stderr + half.stderr
    assert off.stdout == plain.stdout
    assert half.stdout == complete(merged(base, tmp_path / "merged.gguf", deltas, 0.5)).stdout != plain.stdout


def test_adapter_that_does_not_fit_ends_with_code_6_before_the_model_is_loaded(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "bad.gguf", base, wider=1)
    done = complete(base, "--lora", tmp_path / "bad.gguf")
    assert done.returncode == 6
    assert "does not fit blk.0.attn_q.weight" in done.stderr
    assert complete(base, "--lora", tmp_path / "none.gguf").returncode == 2


def test_adapter_without_effect_is_told_on_the_command_line(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "zero.gguf", base, size=0.0)
    done = complete(base, "--lora", tmp_path / "zero.gguf")
    assert done.returncode == 0
    assert "all of its deltas are zero" in done.stderr
