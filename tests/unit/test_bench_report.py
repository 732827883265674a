"""What a bench makes of its samples: medians, ratios, JSON, tables and the picture."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from runtime.bench.case import Case, Lengths
from runtime.bench.contenders import LlamaBench, LlamaCppPython, OwnSample, Sample, llama_bench_argv
from runtime.bench.measure import Field, Measured, Scouted, Subject, gather_field
from runtime.bench.plot import draw, require_plot
from runtime.bench.report import Result, as_json, tables
from runtime.bench.roof import Roof
from runtime.bench.summary import ratio, summarize
from runtime.bench.tools import Tool, matching_tool, toolchain_of
from runtime.settings import settle
from tests.described import machine
from tests.unit.test_bench_reads import EMBEDDING, OUTPUT, header
from toolchain.base.errors import UsageError

SETTINGS = settle(machine=machine(), n_ctx_train=512)
TOOL = Tool(path=Path("llama-bench"), same_libraries=4)
PEERS = (LlamaBench(TOOL, flash_attn=True), LlamaCppPython(flash_attn=True))


def own(prompt_tps: float, generation_tps: float) -> OwnSample:
    return OwnSample(
        prompt_tps=prompt_tps,
        generation_tps=generation_tps,
        ttft_ms=1000 / prompt_tps,
        generated=8,
        overhead_us=5.0,
        peak_rss_bytes=64 << 20,
        buffers={"CPU KV": 1 << 20},
        flash_attn=True,
        offloads=False,
        library_dir=Path(),
        log="",
    )


def measured(name: str = "a.gguf", *, speed: float = 1.0, depth: int = 0, peers: bool = True) -> Measured:
    lengths = Lengths(depth=depth, prompt=16, gen=8)
    case = Case(model=Path(name), settings=SETTINGS, tokens=(0,) * 16, lengths=lengths)
    samples: dict[str, tuple[Sample, ...]] = {
        "ours": tuple(own(100 * speed + jitter, 10 * speed + jitter / 10) for jitter in (0, 3, -2))
    }
    if peers:
        samples["llama-bench"] = tuple(Sample(prompt_tps=200, generation_tps=each) for each in (9, 8, 16))
        samples["llama-cpp-python"] = (Sample(prompt_tps=50, generation_tps=5),) * 3
    model = replace(header(EMBEDDING, OUTPUT, general__file_type=15), path=Path(name))
    return Measured(subject=Subject(headers=(model,), settings=SETTINGS), case=case, samples=samples)


def result(*depths: Measured, others: tuple[Measured, ...] = (), roof: float | None = 1e9) -> Result:
    return Result(
        depths=depths or (measured(),),
        others=others,
        field=Field(peers=PEERS, left_out={}, tool=TOOL),
        roof=Roof(bytes_per_s=roof, reason="" if roof else "layers are on a GPU"),
        runs=3,
        warnings=("other processes kept 1.0 of our 2 CPUs busy",),
    )


def test_a_summary_is_the_median_and_how_far_its_runs_lie_apart() -> None:
    runs = summarize([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (runs.median, runs.noise) == (3.0, pytest.approx((4 - 2) / 3))
    assert runs.as_json() == {
        "median": 3.0,
        "min": 1.0,
        "max": 10.0,
        "noise": 0.6667,
        "runs": [4.0, 1.0, 2.0, 3.0, 10.0],
    }
    assert summarize([5.0, 6.0]).noise is None


def test_a_ratio_is_ours_over_theirs() -> None:
    assert ratio(summarize([2.0, 4.0, 30.0]), summarize([8.0])) == 0.5
    assert ratio(summarize([1.0]), summarize([0.0])) is None


def test_the_answer_holds_medians_and_ratios() -> None:
    answer = as_json(result())
    assert (answer["prompt_tps"], answer["generation_tps"], answer["ttft_ms"]) == (100.0, 10.0, 10.0)
    bench, python = answer["peers"]
    assert (bench["name"], bench["ratio_prompt"], bench["ratio_generation"]) == ("llama-bench", 0.5, 1.1111)
    assert (python["name"], python["ratio_prompt"], python["ratio_generation"]) == ("llama-cpp-python", 2.0, 2.0)
    assert answer["memory"] == {"peak_rss_bytes": 64 << 20, "buffers": {"CPU KV": 1 << 20}}
    assert "compare" not in answer
    assert "depths" not in answer


def test_the_share_of_bandwidth_is_bytes_times_tokens_over_the_roof() -> None:
    answer = as_json(result())
    assert answer["bandwidth_share"] == pytest.approx(answer["bytes_per_token"] * 10.0 / 1e9, rel=1e-3)
    assert as_json(result(roof=None))["bandwidth_share"] is None


def test_a_second_model_comes_with_its_size_and_ratios() -> None:
    answer = as_json(result(others=(measured("b.gguf", speed=0.5, peers=False),)))
    other = answer["compare"]
    assert other["bits_per_weight"] == pytest.approx(
        8 * (EMBEDDING.nbytes + OUTPUT.nbytes) / (2 * 256 * 4096), abs=1e-3
    )
    assert (other["depths"][0]["ratio_prompt"], other["depths"][0]["ratio_generation"]) == (2.0, 2.0)


def test_every_depth_has_its_figures() -> None:
    answer = as_json(result(measured(), measured(depth=64)))
    assert [each["depth"] for each in answer["depths"]] == [0, 64]
    assert answer["depths"][1]["bytes_per_token"] > answer["depths"][0]["bytes_per_token"]


def test_runs_that_disagree_are_named() -> None:
    steady = as_json(result())["warnings"]
    assert steady == ["other processes kept 1.0 of our 2 CPUs busy"]
    each = measured()
    torn = replace(each, samples={**each.samples, "ours": (own(100, 10), own(100, 20), own(100, 30))})
    assert any("generation at depth 0" in warning for warning in as_json(result(torn))["warnings"])


def test_the_tables_name_everyone_and_what_their_figures_hold() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=160)
    for table in tables(result(others=(measured("b.gguf", peers=False),))):
        console.print(table)
    for word in ("ours", "llama-bench", "no sampling", "create_completion", "1.111", "b.gguf", "64.0 MiB"):
        assert word in shown.getvalue()


def test_llama_bench_gets_our_settings_and_generates_where_we_do() -> None:
    settings = settle(
        machine=machine(), n_ctx_train=512, flags={"n_threads": 3, "n_threads_batch": 5, "type_v": "q8_0"}
    )
    case = replace(measured(depth=32).case, settings=settings)
    for generates, wanted in (
        (False, {"-t": "5", "-p": "16", "-n": "0", "-d": "32"}),
        (True, {"-t": "3", "-p": "0", "-n": "8", "-d": "48"}),
    ):
        argv = llama_bench_argv(Path("llama-bench"), case, flash_attn=False, generates=generates)
        options = dict(zip(argv[1::2], argv[2::2], strict=True))
        assert not {"-ncmoe", "-ts"} & set(options)
        assert options.items() >= {**wanted, "-ctv": "q8_0", "-fa": "0", "-ub": "512", "-ngl": "0"}.items()


def test_llama_bench_places_tensors_as_we_do() -> None:
    settings = settle(machine=machine(), n_ctx_train=512, flags={"n_cpu_moe": 7, "tensor_split": "3,1"})
    case = replace(measured().case, settings=settings)
    argv = llama_bench_argv(Path("llama-bench"), case, flash_attn=True, generates=True)
    options = dict(zip(argv[1::2], argv[2::2], strict=True))
    assert options.items() >= {"-ncmoe": "7", "-ts": "3/1"}.items()


def test_a_peer_that_cannot_do_as_we_do_is_left_out_with_the_reason(tmp_path: Path) -> None:
    settings = settle(machine=machine(), n_ctx_train=512, flags={"n_cpu_moe": 7})
    case = replace(measured().case, settings=settings)
    scouted = Scouted(case=case, sample=replace(own(100, 10), library_dir=tmp_path))
    field = gather_field(scouted, wanted=True)
    assert not field.peers
    assert "n_cpu_moe" in field.left_out["llama-cpp-python"]
    assert field.left_out["llama-bench"]


def test_a_wheel_of_ours_names_its_toolchain_and_others_do_not() -> None:
    assert toolchain_of("0.3.36+cpu.g0c1e570.b6e326dd59da9") == "0c1e570-6e326dd59da9"
    assert toolchain_of("0.3.36+cu130.sm90.g0c1e570.b9978cff6a396") == "0c1e570-9978cff6a396"
    assert toolchain_of("0.3.36") is None


def test_a_tool_on_other_libraries_is_left_out(tmp_path: Path) -> None:
    toolchain, loaded = tmp_path / "0c1e570-6e326dd59da9", tmp_path / "llama_cpp"
    for folder in (toolchain / "bin", toolchain / "lib", loaded):
        folder.mkdir(parents=True)
    assert "there is no" in str(matching_tool(toolchain, "llama-bench", loaded))
    (toolchain / "bin" / "llama-bench").touch()
    assert "no libraries" in str(matching_tool(toolchain, "llama-bench", loaded))
    (loaded / "libmtmd.so").write_text("is not asked for")
    (loaded / "libllama.so").write_text("one")
    assert "has no libllama.so" in str(matching_tool(toolchain, "llama-bench", loaded))
    (toolchain / "lib" / "libllama.so").write_text("another")
    assert "is another" in str(matching_tool(toolchain, "llama-bench", loaded))
    (toolchain / "lib" / "libllama.so").write_text("one")
    found = matching_tool(toolchain, "llama-bench", loaded)
    assert found == Tool(path=toolchain / "bin" / "llama-bench", same_libraries=1)


@pytest.mark.parametrize("roof", [1e7, 1e9, None])
def test_the_picture_is_a_png_of_a_readable_size(tmp_path: Path, roof: float | None) -> None:
    path = tmp_path / "bench.png"
    path.write_text("an older one is replaced")
    draw(result(measured(), measured(depth=64), others=(measured("b.gguf", peers=False),) * 2, roof=roof), path)
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert width >= 1200
    assert height >= 600
    assert [each.name for each in tmp_path.iterdir()] == ["bench.png"]


@pytest.mark.parametrize("name", ["bench.svg", "nowhere/bench.png", "folder.png"])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError):
        require_plot(tmp_path / name)
    require_plot(tmp_path / "bench.png")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.png"]
