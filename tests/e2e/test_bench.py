"""``python -m runtime bench`` on the demo model: who takes part, what the figures are, what is refused."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from toolchain.base.files import PROJECT_ROOT
from toolchain.build.toolchain import Toolchain

PATIENCE_S = 600
FEW = ("--runs", "2", "--prompt-tokens", "24", "--gen-tokens", "8")
FIGURES = ("prompt_tps", "generation_tps", "ttft_ms", "overhead_us_per_token", "bandwidth_share")


@pytest.fixture
def environment(tmp_path: Path, toolchain: Toolchain) -> dict[str, str]:
    """A FOUNDRY_HOME of our own that borrows the one Toolchain that llama_cpp was packaged from."""
    home = tmp_path / "home"
    (home / "toolchains").mkdir(parents=True)
    (home / "toolchains" / toolchain.id).symlink_to(toolchain.root.resolve())
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    # Threads that wait for each other by spinning crawl when other work holds a CPU: let them sleep soon.
    patient = {"GOMP_SPINCOUNT": "100"}
    return {**clean, **patient, "FOUNDRY_HOME": str(home), "TERM": "dumb", "PYTHONPATH": str(PROJECT_ROOT)}


def argv(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "runtime", "bench", *map(str, arguments)]


def bench(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv(*arguments), env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def answer_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def require_sane(figures: dict[str, Any]) -> None:
    assert figures["prompt_tps"] > 0
    assert figures["generation_tps"] > 0
    assert figures["ttft_ms"] > 0
    for spread in figures["spread"].values():
        assert spread["min"] <= spread["median"] <= spread["max"]
    for peer in figures["peers"]:
        assert peer["ratio_prompt"] == pytest.approx(figures["prompt_tps"] / peer["prompt_tps"], rel=0.01)
        assert peer["ratio_generation"] == pytest.approx(figures["generation_tps"] / peer["generation_tps"], rel=0.01)


def test_the_last_line_has_every_figure_beside_both_peers(environment: dict[str, str], demo_gguf: Path) -> None:
    done = bench(environment, demo_gguf, *FEW)
    answer = answer_of(done)
    require_sane(answer)
    assert set(FIGURES) <= set(answer)
    assert [peer["name"] for peer in answer["peers"]] == ["llama-bench", "llama-cpp-python"]
    assert answer["left_out"] == []
    assert answer["same_libraries"] >= 4
    assert all(len(peer["spread"]["prompt_tps"]["runs"]) == answer["runs"] == 2 for peer in answer["peers"])
    assert (answer["prompt_tokens"], answer["gen_tokens"], answer["depth"]) == (24, 8, 0)
    # The prompt's time is in the time to the first token, and little else is.
    assert answer["ttft_ms"] >= 0.9 * 24 / answer["spread"]["prompt_tps"]["max"] * 1000
    assert 0 < answer["bytes_per_token"] < demo_gguf.stat().st_size + (1 << 20)
    assert answer["bandwidth_share"] == pytest.approx(
        answer["bytes_per_token"] * answer["generation_tps"] / answer["read_bandwidth_bytes_per_s"], rel=0.01
    )
    assert answer["memory"]["peak_rss_bytes"] > answer["memory"]["buffers"]["CPU KV"] > 0
    assert answer["model"]["model"] == str(demo_gguf)
    settings = {setting["name"]: setting["value"] for setting in answer["settings"]}
    assert settings["n_ctx"] == 24 + 8 + 1
    for word in ("ours", "llama-bench", "llama-cpp-python", "overhead", "no sampling"):
        assert word in done.stderr


def test_a_second_model_is_measured_in_the_same_run_and_drawn(
    environment: dict[str, str], demo: dict[str, Any], demo_gguf: Path, tmp_path: Path
) -> None:
    other = next(Path(artifact["path"]) for artifact in demo["artifacts"] if artifact["type"] == "Q8_0")
    picture = tmp_path / "bench.png"
    depths = ("--depth", "0,16", "--plot", picture, "--json", "--no-peers")
    done = bench(environment, demo_gguf, *FEW, "--compare", other, *depths)
    answer = answer_of(done)
    require_sane(answer)
    assert [each["depth"] for each in answer["depths"]] == [0, 16]
    assert answer["depths"][1]["bytes_per_token"] > answer["depths"][0]["bytes_per_token"]
    assert {each["name"] for each in answer["left_out"]} == {"llama-bench", "llama-cpp-python"}
    assert answer["peers"] == []
    second = answer["compare"]
    assert (second["model"], second["bytes"]) == (str(other), other.stat().st_size)
    assert second["bits_per_weight"] > answer["model"]["bits_per_weight"]
    first = second["depths"][0]
    assert first["ratio_generation"] == pytest.approx(answer["generation_tps"] / first["generation_tps"], rel=0.01)
    assert "generation t/s" not in done.stderr
    raw = picture.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert width >= 1000
    assert height >= 500


def test_without_its_toolchain_llama_bench_is_left_out_with_the_reason(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    elsewhere = {**environment, "FOUNDRY_HOME": str(tmp_path / "empty")}
    answer = answer_of(bench(elsewhere, demo_gguf, *FEW, "--runs", "1"))
    assert [peer["name"] for peer in answer["peers"]] == ["llama-cpp-python"]
    (left_out,) = answer["left_out"]
    assert left_out["name"] == "llama-bench"
    assert "there is no" in left_out["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--runs", "0"), "--runs cannot be 0"),
        (("--gen-tokens", "0"), "--gen-tokens cannot be 0"),
        (("--prompt-tokens", "-3"), "--prompt-tokens cannot be -3"),
        (("--prompt-tokens", "500", "--gen-tokens", "100"), "more than the model's context of 512"),
        (("--depth", "0,deep"), "--depth takes numbers"),
        (("--depth", "4096"), "lower --depth"),
        (("--n-ctx", "16"), "--n-ctx 16 is less"),
        (("--compare", "nothing.gguf"), "nothing.gguf"),
        (("--plot", "nowhere/bench.png"), "cannot be written"),
        (("--plot", "bench.jpg"), "writes a PNG"),
        (("--type-k", "q9"), "is not a cache type"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    environment: dict[str, str], demo_gguf: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = bench(environment, demo_gguf, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "rounds" not in done.stderr


def test_a_context_that_the_library_refuses_keeps_its_exit_code(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(demo_gguf.read_bytes().replace(b"llama.rope.freq_base", b"llama.rope.freq_bass").replace(
        b"llama.attention.layer_norm_rms_epsilon", b"llama.attention.layer_norm_rms_epsilom"))  # fmt: skip
    done = bench(environment, strange, *FEW)
    assert (done.returncode, done.stdout) == (6, ""), done.stderr
    assert "the library refuses strange.gguf" in done.stderr


def test_an_interrupt_ends_it_without_half_an_answer(environment: dict[str, str], demo_gguf: Path) -> None:
    with subprocess.Popen(
        argv(demo_gguf, *FEW, "--runs", "1000"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "find a prompt" in line:
                break
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
