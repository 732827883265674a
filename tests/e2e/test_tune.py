"""``python -m runtime tune`` as a user runs it, on the demo model: what it chooses, says, keeps, and does once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.engine.load import load_model
from runtime.model_file import open_model
from runtime.settings import settle
from runtime.tune.at_start import tuned
from runtime.tune.record import ATTEMPTS
from toolchain.base.errors import MemoryFitError
from toolchain.base.files import PROJECT_ROOT
from toolchain.base.machine import probe

PATIENCE_S = 120
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
one_cpu = pytest.mark.skipif(not CPUS, reason="this system has no affinity masks")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    own = {"FOUNDRY_HOME": str(home), "TERM": "dumb", "PYTHONPATH": str(PROJECT_ROOT)}
    return {**clean, "GOMP_SPINCOUNT": "100", **own}


def on_one_cpu() -> None:
    """As ``taskset -c N`` does."""
    os.sched_setaffinity(0, CPUS[:1])


def tune(
    environment: dict[str, str], *arguments: object, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "tune", *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        preexec_fn=before,
    )
    assert done.returncode == 0, done.stderr
    return done


def tune_json(
    environment: dict[str, str], *arguments: object, before: Callable[[], None] | None = None
) -> dict[str, Any]:
    value = json.loads(tune(environment, *arguments, "--json", before=before).stdout)
    assert isinstance(value, dict)
    return value


def chosen(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {setting["name"]: setting for setting in answer["settings"]}


@one_cpu
def test_one_cpu_means_one_thread_and_the_reason_says_so(environment: dict[str, str], demo_gguf: Path) -> None:
    answer = tune_json(environment, demo_gguf, before=on_one_cpu)
    assert answer["measured_now"] is True
    for name in ("n_threads", "n_threads_batch"):
        setting = chosen(answer)[name]
        assert (setting["value"], setting["origin"]) == (1, "tuned")
        assert setting["reason"].startswith("the one CPU that we may use: measured ")
        (point,) = answer["tuning"]["found"][name]["points"]
        assert point["value"] == 1
        assert point["rate"] > 0


@one_cpu
def test_the_second_start_measures_nothing_and_says_the_same(environment: dict[str, str], demo_gguf: Path) -> None:
    first = tune_json(environment, demo_gguf, before=on_one_cpu)
    record = Path(first["record"])
    kept = record.read_bytes(), record.stat().st_mtime_ns
    done = tune(environment, demo_gguf, "--json", before=on_one_cpu)
    second = json.loads(done.stdout)
    assert second["measured_now"] is False
    assert "measure" not in done.stderr
    assert second["tuning"] == first["tuning"]
    assert (record.read_bytes(), record.stat().st_mtime_ns) == kept
    assert tune_json(environment, demo_gguf, "--again", before=on_one_cpu)["measured_now"] is True
    assert record.stat().st_mtime_ns > kept[1]


@one_cpu
def test_a_damaged_record_is_measured_again(environment: dict[str, str], demo_gguf: Path) -> None:
    record = Path(tune_json(environment, demo_gguf, before=on_one_cpu)["record"])
    record.write_text(record.read_text()[:40])
    answer = tune_json(environment, demo_gguf, before=on_one_cpu)
    assert answer["measured_now"] is True
    assert Path(answer["record"]) == record
    assert tune_json(environment, demo_gguf, before=on_one_cpu)["measured_now"] is False


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_a_wider_mask_is_measured_for_itself(environment: dict[str, str], demo_gguf: Path) -> None:
    narrow = tune_json(environment, demo_gguf, before=on_one_cpu)
    wide = tune_json(environment, demo_gguf)
    assert wide["measured_now"] is True
    assert wide["record"] != narrow["record"]
    for name in ("n_threads", "n_threads_batch"):
        rates = {point["value"]: point["rate"] for point in wide["tuning"]["found"][name]["points"]}
        assert len(rates) > 1
        assert chosen(wide)[name]["value"] in rates
        assert f"of {len(CPUS)} CPUs" in chosen(wide)[name]["reason"] or "all " in chosen(wide)[name]["reason"]


def test_threads_that_were_given_are_not_measured(environment: dict[str, str], demo_gguf: Path) -> None:
    answer = tune_json({**environment, "FOUNDRY_N_UBATCH": "64"}, demo_gguf, "--n-threads", 1)
    assert chosen(answer)["n_threads"] == {"name": "n_threads", "value": 1, "origin": "flag", "reason": "--n-threads"}
    assert (chosen(answer)["n_ubatch"]["value"], chosen(answer)["n_ubatch"]["origin"]) == (64, "env")
    assert list(answer["tuning"]["found"]) == ["n_threads_batch"]


@one_cpu
def test_the_table_shows_what_was_measured_and_each_line_its_reason(
    environment: dict[str, str], demo_gguf: Path
) -> None:
    done = tune(environment, demo_gguf, before=on_one_cpu)
    table, *lines = done.stdout.splitlines()
    assert table.split("  ")[0] == "threads"
    assert lines[0].split()[0] == "1"
    assert any(line.startswith("n_threads ") and "the one CPU that we may use" in line for line in lines)
    assert "✓ measure" in done.stderr


def test_a_home_that_cannot_be_written_costs_the_record_and_nothing_else(
    environment: dict[str, str], demo_gguf: Path
) -> None:
    answer = tune_json({**environment, "FOUNDRY_HOME": "/dev/null/home"}, demo_gguf)
    assert answer["measured_now"] is True
    assert answer["record"] is None
    assert chosen(answer)["n_threads"]["value"] >= 1


def test_what_cannot_be_measured_is_tried_a_few_times_and_then_left(
    home: Path, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOUNDRY_HOME", str(home))
    header, here = open_model(demo_gguf), probe()
    settings = settle(machine=here, n_ctx_train=None)
    tries: list[int] = []

    def fail(*_arguments: object, **_options: object) -> Any:
        tries.append(1)
        raise MemoryFitError("the context does not fit in memory")

    monkeypatch.setattr("runtime.tune.at_start.measure", fail)
    model = load_model(demo_gguf, settings)
    try:
        for _ in range(ATTEMPTS + 2):
            assert tuned(model, settings, header, here)["n_threads"].value == here.generation_threads.count
    finally:
        model.close()
    assert len(tries) == ATTEMPTS


def test_a_model_that_was_just_loaded_is_measured_once(
    home: Path, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, within a described quota of one CPU, so that there is one number of threads to choose from."""
    monkeypatch.setenv("FOUNDRY_HOME", str(home))
    here = replace(probe(), quota=1.0)
    header = open_model(demo_gguf)
    settings = settle(machine=here, n_ctx_train=header.n_ctx_train, flags={"n_threads_batch": 1})
    model = load_model(demo_gguf, settings)
    try:
        asked: list[str] = []
        first = tuned(model, settings, header, here, on_setting=asked.append)
        assert asked == ["n_threads", "n_ubatch"]
        assert first["n_threads"].reason.startswith("1 of ") or first["n_threads"].reason.startswith("the one CPU")
        assert "measured" in first["n_threads"].reason
        assert first["n_threads_batch"].origin == "flag"
        assert tuned(model, settings, header, here, on_setting=asked.append) == first
        assert asked == ["n_threads", "n_ubatch"]
    finally:
        model.close()
