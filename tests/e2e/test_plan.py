"""``python -m runtime plan`` as a user runs it, and loads under a memory limit that the plan does not know of."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.engine.load import _context_params, load
from runtime.engine.placement import apply_placement
from runtime.library import import_library, route_log
from runtime.memory.here import plan_here
from runtime.settings import settle
from tests.generated_models import write_header, write_model
from tests.loopback_hub import LoopbackHub, serve_hub
from toolchain.base.files import PROJECT_ROOT
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import read_header
from toolchain.base.machine import probe

PATIENCE_S = 120
MIB = 1 << 20
LIMIT_BYTES = 900 * MIB
"""Of address space: enough for Python, the library and a cache of 512 MiB, and not for one of 1 GiB."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FOUNDRY_", "HF_"))}
    own = {"FOUNDRY_HOME": str(tmp_path / "home"), "TERM": "dumb", "PYTHONPATH": str(PROJECT_ROOT)}
    return {**clean, "GOMP_SPINCOUNT": "100", **own}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small.gguf", "llama", type="q8_0")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 MB of weights and 256 KiB of cache for each token: 1 GiB at 4096."""
    path = tmp_path_factory.mktemp("models") / "wide.gguf"
    extents = {"n_layer": 16, "n_embd": 128, "n_head": 64, "n_head_kv": 64, "head": 64, "n_ff": 256}
    return write_model(path, "llama", type="q8_0", **extents)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("hub") / "model"
    folder.mkdir()
    for kind in ("Q4_0", "Q8_0", "F16"):
        write_model(folder / f"model-{kind}.gguf", "llama", type=kind, n_embd=1024, n_ff=2048)
    with serve_hub({"acme/model": folder}) as served:
        yield served


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))


def run(
    environment: dict[str, str], *arguments: object, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime", *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        preexec_fn=before,
    )


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def setting(answered: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in answered["settings"] if each["name"] == name)


def test_json_holds_settings_devices_and_the_verdict(environment: dict[str, str], small: Path) -> None:
    done = run(environment, "plan", small, "--json", "--n-ctx", "8192")
    assert done.returncode == 0, done.stderr
    told = answer(done)
    assert told["fits"] is True
    assert (setting(told, "n_ctx")["value"], setting(told, "n_ctx")["origin"]) == (8192, "flag")
    host = told["devices"][0]
    assert {"name", "weights_bytes", "kv_bytes", "compute_bytes", "free_bytes", "margin_bytes"} <= set(host)
    assert host["kv_bytes"] == 4 * 2 * 2 * 64 * 2 * 8192  # layers, K and V, heads, width, bytes, tokens
    assert told["speed"]["generation_tps"] > 0


def test_the_librarys_own_sizes_are_used_where_it_tells_them(environment: dict[str, str], small: Path) -> None:
    from runtime.memory.ask_library import can_ask

    assert answer(run(environment, "plan", small, "--json"))["exact"] is can_ask()


def test_text_shows_reasons_bars_and_notes(environment: dict[str, str], small: Path) -> None:
    done = run(environment, "plan", small, "--vram", "8GiB@272", "--ram", "16GiB")
    assert done.returncode == 0, done.stderr
    assert "n_gpu_layers" in done.stdout
    assert "all 5 layers" in done.stdout
    assert "w weights" in done.stdout
    assert "t/s for generation" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_header_alone_is_enough_for_a_large_model(environment: dict[str, str], tmp_path: Path) -> None:
    shape = {"n_layer": 60, "n_embd": 6656, "n_head": 52, "n_head_kv": 52, "head": 128, "n_ff": 17920}
    path = write_header(tmp_path / "30b.gguf", "llama", type="q6_k", **shape)
    assert path.stat().st_size > 20 << 30
    told = answer(run(environment, "plan", path, "--vram", "16GiB", "--ram", "16GiB", "--n-ctx", "2048", "--json"))
    assert told["fits"] is True
    assert 20 < setting(told, "n_gpu_layers")["value"] < 60
    assert all(device["left_bytes"] >= 0 for device in told["devices"])


def test_what_does_not_fit_ends_with_7_and_what_would(environment: dict[str, str], wide: Path) -> None:
    arguments = ("plan", wide, "--vram", "0", "--ram", "8GiB", "--n-ctx", "65536")
    done = run(environment, *arguments, "--json")
    assert done.returncode == 7
    assert answer(done)["fits"] is False
    assert "--n-ctx 16384" in done.stderr
    assert "host: " in done.stderr
    assert run(environment, *arguments[:-1], "16384").returncode == 0


def test_all_quants_of_a_repository_without_a_download(environment: dict[str, str], hub: LoopbackHub) -> None:
    online = {**environment, "HF_ENDPOINT": hub.url}
    done = run(online, "plan", "acme/model", "--all-quants", "--json", "--vram", "0", "--ram", "8GiB")
    assert done.returncode == 0, done.stderr
    rows = {row["quant"]: row for row in answer(done)["quants"]}
    assert set(rows) == {"Q4_0", "Q8_0", "F16"}
    assert rows["Q4_0"]["bytes"] < rows["Q8_0"]["bytes"] < rows["F16"]["bytes"]
    assert [name for name, row in rows.items() if row["best"]] == ["F16"]
    table = run(online, "plan", "acme/model", "--all-quants", "--vram", "0", "--ram", "8GiB")
    assert "bits/weight" in table.stdout
    none = run(online, "plan", "acme/model", "--all-quants", "--vram", "0", "--ram", "64MiB")
    assert none.returncode == 7
    one = answer(run(online, "plan", "acme/model:Q8_0", "--json"))
    assert one["devices"][0]["weights_bytes"] > rows["Q4_0"]["bytes"]
    assert not list(Path(environment["FOUNDRY_HOME"]).rglob("*.incomplete"))


def test_a_load_that_runs_out_of_memory_backs_off_once_and_remembers(environment: dict[str, str], wide: Path) -> None:
    arguments = ("complete", wide, "-p", "ab", "-n", "4", "--json")
    first = run(environment, *arguments, before=limited)
    assert first.returncode == 0, first.stderr
    assert "loading once more with n_ctx 2048 (was 4096)" in first.stderr
    second = run(environment, *arguments, before=limited)
    assert second.returncode == 0, second.stderr
    assert "once more" not in second.stderr
    assert (setting(answer(second), "n_ctx")["value"], setting(answer(second), "n_ctx")["origin"]) == (2048, "tuned")


def test_a_first_start_that_measures_threads_learns_from_its_own_context_only(
    environment: dict[str, str], small: Path
) -> None:
    done = run(environment, "complete", small, "-p", "ab", "-n", "4")
    assert done.returncode == 0, done.stderr
    assert "measuring the fastest threads" in done.stderr
    (kept,) = (Path(environment["FOUNDRY_HOME"]) / "tune").glob("memory-*.json")
    (lesson,) = json.loads(kept.read_text())["loads"]
    (planned,), (made,), (kv,) = lesson["planned"], lesson["compute"], lesson["kv"]
    assert made / planned == pytest.approx(1.0, abs=0.01 * MIB / planned)
    assert kv == 4 * 2 * 2 * 64 * 2 * 4096  # layers, K and V, heads, width, bytes, tokens


@pytest.mark.parametrize("sequences", [1, 3, 40])
def test_the_context_is_made_as_it_was_planned(small: Path, sequences: int) -> None:
    header, here = read_header(small), probe()
    planned = plan_here([header], {}, here, sequences=sequences)
    settings = settle(machine=here, n_ctx_train=header.n_ctx_train, tuned=planned.plan.settings)
    lib, demand = import_library(), planned.plan.demand
    params = _context_params(lib, settings, sequences)
    for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_outputs_max", "kv_unified", "swa_full"):
        assert getattr(params, name) == getattr(demand, name), name
    types = [GGML_TYPES_BY_NAME[name.upper()].id for name in (demand.type_k, demand.type_v)]
    assert [params.type_k, params.type_v] == types
    with load(small, settings, sequences=sequences) as engine:
        handle = engine.context.handle
        assert lib.llama_n_seq_max(handle) == demand.n_seq_max
        made = (lib.llama_n_ctx(handle), lib.llama_n_batch(handle), lib.llama_n_ubatch(handle))
        assert made == (demand.n_ctx, demand.n_batch, demand.n_ubatch)


def test_what_was_asked_for_is_not_given_up(environment: dict[str, str], wide: Path) -> None:
    done = run(environment, "complete", wide, "-p", "ab", "-n", "4", "--n-ctx", "4096", before=limited)
    assert done.returncode == 7, done.stderr
    assert "once more" not in done.stderr


def test_experts_and_shares_reach_the_library(tmp_path: Path) -> None:
    path = write_model(tmp_path / "experts.gguf", "mixtral", type="q8_0")
    flags = {"n_cpu_moe": "2", "tensor_split": "3,1", "n_gpu_layers": "all"}
    settings = settle(machine=probe(), n_ctx_train=None, flags=flags)
    lib = import_library()
    log = route_log(lib, verbose=False)
    params = lib.llama_model_default_params()
    kept = apply_placement(lib, params, settings)
    assert (params.n_gpu_layers, params.tensor_split[0], params.tensor_split[1]) == (-1, 3.0, 1.0)
    params.no_alloc, params.load_mode = True, 0
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    assert model
    lib.llama_model_free(model)
    del kept
    moved = {line.split()[1] for line in log.lines() if "overridden to CPU" in line}
    assert moved == {f"blk.{layer}.ffn_{part}_exps.weight" for layer in (0, 1) for part in ("up", "down", "gate")}
