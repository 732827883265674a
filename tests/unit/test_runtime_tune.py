"""The search among numbers of threads, on machines that a function describes; what of it is kept, and for whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from runtime.settings import Settings, settle
from runtime.tune.bandwidth import cache_bytes, read_bandwidth, recorded_bandwidth
from runtime.tune.neighbours import crowded
from runtime.tune.record import ATTEMPTS, Tuning, keep, record_path, recorded, threads_guessed, wanted
from runtime.tune.search import MOST_ROUNDS, Found, Point, search
from runtime.tune.threads import apply, as_settings, thread_candidates, tuned_threads
from tests.described import GIB, machine
from toolchain.base import files
from toolchain.base.gguf import GgufHeader
from toolchain.base.gguf_header import TensorInfo
from toolchain.base.gpu import Gpu
from toolchain.base.machine import Machine

HERE = machine(cpus=4, cores=2)


class Described:
    """A model on a machine: a rate for each number of threads, a time for each burst, and who disturbs."""

    def __init__(self, rate: Callable[[int], float], *, burst_s: float = 0.1) -> None:
        self.rate = rate
        self.burst_s = burst_s
        self.now = 0.0
        self.bursts: list[int] = []

    def sample(self, threads: int) -> float:
        self.bursts.append(threads)
        self.now += self.burst_s
        return self.rate(threads)

    def search(self, candidates: tuple[int, ...], start: int, *, budget_s: float = 60.0, **options: Any) -> Found:
        return search(candidates, start, self.sample, budget_s=budget_s, clock=lambda: self.now, **options)


def test_the_fastest_is_found_wherever_it_lies() -> None:
    for best in (1, 2, 4, 8):
        described = Described(lambda threads, best=best: 100 - 12 * abs(threads - best))  # type: ignore[misc]
        assert described.search((1, 2, 4, 8), start=4).value == best


def test_fewer_threads_are_taken_where_more_are_no_faster() -> None:
    """Memory is the limit from 4 on: 8 gain one per cent, which is noise."""
    described = Described({1: 30.0, 2: 60.0, 4: 100.0, 8: 101.0}.__getitem__)
    assert described.search((1, 2, 4, 8), start=8).value == 4


def test_a_micro_batch_stays_unless_another_is_clearly_faster() -> None:
    described = Described({256: 104.0, 512: 100.0, 1024: 99.0}.__getitem__)
    assert described.search((256, 512, 1024), start=512, margin=0.05, fewest=False).value == 512


def test_a_neighbour_who_comes_and_goes_does_not_decide() -> None:
    """Rounds differ threefold; within a round 2 threads are faster by a tenth each time."""
    described = Described(lambda threads: 0.0)
    described.rate = lambda threads: (
        (300, 100, 200)[(len(described.bursts) - 1) // 2 % 3] * (1.1 if threads == 2 else 1)
    )
    assert described.search((1, 2), start=1).value == 2


def test_winning_a_little_more_than_half_of_the_rounds_is_not_enough() -> None:
    """2 threads are faster by a tenth in every other round and slower in between: that is chance."""
    described = Described(lambda threads: 0.0)
    described.rate = lambda threads: (
        100 if threads == 1 else (110, 97)[(len([b for b in described.bursts if b == 2]) - 1) % 2]
    )
    assert described.search((1, 2), start=1).value == 1


def test_one_disturbed_burst_does_not_throw_out_the_computed_answer() -> None:
    described = Described(lambda threads: 0.0)
    described.rate = lambda threads: 5.0 if len(described.bursts) == 1 else {1: 60.0, 2: 100.0}[threads]
    assert described.search((1, 2), start=2).value == 2


def test_what_lies_beyond_a_far_slower_value_is_not_tried() -> None:
    described = Described(float)
    found = described.search((1, 2, 4, 8, 16), start=16)
    assert found.value == 16
    assert set(described.bursts) == {16, 8, 4}


def test_a_slow_model_ends_in_time_with_the_computed_answer() -> None:
    described = Described(float, burst_s=3.0)
    found = described.search((1, 2, 4), start=2, budget_s=2.0)
    assert (found.value, described.bursts) == (2, [2])


def test_a_search_ends_though_two_values_stay_alike() -> None:
    described = Described(lambda threads: 100.0)
    assert described.search((1, 2), start=2).value == 1
    assert len(described.bursts) <= 2 * MOST_ROUNDS


def test_unsteady_bursts_are_told() -> None:
    described = Described(lambda threads: 0.0)
    described.rate = lambda threads: (100, 150, 60)[len(described.bursts) % 3]
    assert described.search((1,), start=1).noise > 0.1


@pytest.mark.parametrize(
    ("here", "start", "candidates"),
    [
        (machine(cpus=1, cores=1), 1, (1,)),
        (machine(cpus=2, cores=2), 2, (1, 2)),
        (machine(cpus=64, cores=32, quota=1.0), 1, (1,)),
        (machine(cpus=64, cores=32, quota=1.5), 1, (1, 2)),  # threads that share what is left over may still pay
        (machine(cpus=64, cores=32, quota=0.5), 1, (1,)),
        (machine(cpus=16, cores=8), 8, (1, 2, 4, 6, 8, 16)),
        (machine(cpus=20, cores=14, performance_cores=6, performance_cpus=12), 6, (1, 3, 4, 6, 12, 14, 20)),
        (machine(cpus=192, cores=96, node_cores=(48, 48)), 96, (1, 24, 48, 72, 96, 192)),
        (machine(cpus=192, cores=96, quota=20.0), 20, (1, 5, 10, 15, 20)),
    ],
)
def test_the_numbers_of_threads_that_are_tried(here: Machine, start: int, candidates: tuple[int, ...]) -> None:
    assert thread_candidates(here, start) == candidates


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build of its own: the installed one may be replaced while the tests run."""
    path = tmp_path / "lib" / "libllama.so"
    path.parent.mkdir()
    path.write_bytes(b"a build")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(path.parent))
    return path


@pytest.fixture
def header(tmp_path: Path) -> GgufHeader:
    return described_header(tmp_path / "model.gguf")


def described_header(path: Path, *, type_: str = "Q4_K") -> GgufHeader:
    tensor = TensorInfo(name="output.weight", shape=(256, 4096), type=type_, offset=0, nbytes=589_824)
    return GgufHeader(
        path=path,
        version=3,
        byte_order="little",
        metadata=MappingProxyType({"general.architecture": "llama"}),
        tensors=(tensor,),
        alignment=32,
        data_offset=1024,
        file_bytes=590_848,
    )


def open_settings(**flags: int) -> Settings:
    return apply(settle(machine=HERE, n_ctx_train=2048, flags=flags), None, HERE)


def found(chosen: int, rates: dict[int, float], *, noise: float = 0.0) -> Found:
    points = tuple(Point(value=value, rate=rate, bursts=5) for value, rate in sorted(rates.items()))
    return Found(value=chosen, points=points, noise=noise)


def tuning(**changes: Any) -> Tuning:
    quiet = Tuning(
        asked=("n_threads", "n_threads_batch", "n_ubatch"),
        found={
            "n_threads": found(1, {1: 512.0, 2: 301.0}),
            "n_threads_batch": found(4, {1: 90.0, 2: 180.0, 4: 181.0}),
        },
        others=0.1,
        crowded=False,
        depth=256,
        batch=512,
        seconds=3.5,
    )
    return replace(quiet, **changes)


def test_what_was_measured_is_known_at_the_next_start_and_under_another_path(
    header: GgufHeader, tmp_path: Path
) -> None:
    settings = open_settings()
    assert recorded(header, HERE, settings) is None
    kept = keep(tuning(), header, HERE, settings)
    assert recorded(described_header(tmp_path / "a-fine-tune.gguf"), HERE, settings) == kept == tuning()


def test_another_machine_model_or_mask_knows_nothing_of_it(header: GgufHeader, tmp_path: Path) -> None:
    settings = open_settings()
    keep(tuning(), header, HERE, settings)
    assert recorded(described_header(tmp_path / "model.gguf", type_="Q8_0"), HERE, settings) is None
    for change in ({"cpus": 2}, {"quota": 1.5}, {"cores": 4}, {"cpu_model": "another"}, {"node_cores": (1, 1)}):
        assert recorded(header, replace(HERE, **change), settings) is None, change  # type: ignore[arg-type]
    assert recorded(header, replace(HERE, available_bytes=GIB), settings) is not None


def test_another_build_or_another_way_to_wait_knows_nothing_of_it(
    header: GgufHeader, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = open_settings()
    keep(tuning(), header, HERE, settings)
    with monkeypatch.context() as changed:
        changed.setenv("GOMP_SPINCOUNT", "300000")
        assert recorded(header, HERE, settings) is None
    assert recorded(header, HERE, settings) is not None
    library.write_bytes(b"another build")
    assert recorded(header, HERE, settings) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"form": 2', '"form": 0'),
        lambda text: text.replace('"n_threads"', '"n_gpu_layers"'),
        lambda text: text.replace('"value": 1,', '"value": 4096,'),
        lambda text: text.replace('"value": 1,', '"value": "1",'),
        lambda text: text.replace("512.0", "NaN"),
        lambda text: text.replace("512.0", "-1"),
        lambda text: text.replace('"points"', '"dots"'),
    ],
)
def test_a_record_that_is_damaged_or_foreign_is_ignored(spoil: Callable[[str], str], header: GgufHeader) -> None:
    settings = open_settings()
    keep(tuning(), header, HERE, settings)
    path = record_path(header, HERE, settings)
    spoiled = spoil(path.read_text())
    assert spoiled != path.read_text()
    path.write_text(spoiled)
    assert recorded(header, HERE, settings) is None
    keep(tuning(), header, HERE, settings)
    assert recorded(header, HERE, settings) == tuning()


@pytest.mark.parametrize(
    "unsteady", [{"crowded": True}, {"found": {"n_threads": found(1, {1: 9.0, 2: 8.0}, noise=0.3)}}]
)
def test_a_noisy_measurement_is_made_again_a_few_times(unsteady: dict[str, Any], header: GgufHeader) -> None:
    settings = open_settings()
    for attempt in range(1, ATTEMPTS):
        assert keep(tuning(**unsteady), header, HERE, settings).attempts == attempt
        assert recorded(header, HERE, settings) is None
    keep(tuning(**unsteady), header, HERE, settings)
    assert recorded(header, HERE, settings) is not None


def test_failed_measurement_is_made_again_a_few_times_and_takes_nothing_away(header: GgufHeader) -> None:
    settings = open_settings()
    failed = tuning(found={}, failed=True)
    for attempt in range(1, ATTEMPTS):
        assert keep(failed, header, HERE, settings).attempts == attempt
        assert recorded(header, HERE, settings) is None
    keep(failed, header, HERE, settings)
    known = recorded(header, HERE, settings)
    assert known is not None
    assert threads_guessed(header, HERE, settings)
    assert apply(settings, known, HERE) == settings
    assert keep(tuning(), header, HERE, settings).attempts == ATTEMPTS + 1
    assert dict(keep(failed, header, HERE, settings).found) == dict(tuning().found)


def test_each_placement_on_a_machine_with_gpus_has_a_record_of_its_own(header: GgufHeader) -> None:
    here = replace(HERE, gpus=(Gpu(name="a GPU", memory_bytes=8 * GIB),))
    layouts: tuple[dict[str, int | str], ...] = (
        {"n_gpu_layers": 3},
        {"n_gpu_layers": 3, "n_cpu_moe": 4},
        {"n_gpu_layers": 3, "tensor_split": "3,1"},
    )
    settings = [settle(machine=here, n_ctx_train=2048, flags=flags) for flags in layouts]
    assert len({record_path(header, here, each) for each in settings}) == 3
    assert len({record_path(header, HERE, each) for each in settings}) == 1


def test_threads_are_guessed_until_they_are_measured_or_given(header: GgufHeader) -> None:
    assert threads_guessed(header, HERE, open_settings())
    assert not threads_guessed(header, HERE, open_settings(n_threads=1, n_threads_batch=2))
    keep(tuning(), header, HERE, open_settings())
    assert not threads_guessed(header, HERE, open_settings())


def test_without_a_choice_noise_does_not_matter(header: GgufHeader) -> None:
    settings = open_settings()
    keep(tuning(crowded=True, found={"n_threads": found(1, {1: 9.0}, noise=0.5)}), header, HERE, settings)
    assert recorded(header, HERE, settings) is not None


def test_what_the_user_gives_is_neither_measured_nor_overruled(header: GgufHeader) -> None:
    given = open_settings(n_threads=3, n_ubatch=64)
    assert wanted(given) == ("n_threads_batch",)
    settled = apply(given, tuning(), HERE)
    assert [settled.number(name) for name in ("n_threads", "n_threads_batch", "n_ubatch")] == [3, 4, 64]
    # A measurement of the rest serves those who ask for no more, and is completed for others.
    rest = tuning(asked=("n_threads_batch",), found={"n_threads_batch": tuning().found["n_threads_batch"]})
    keep(rest, header, HERE, given)
    assert recorded(header, HERE, given) is not None
    assert recorded(header, HERE, open_settings()) is None
    keep(tuning(asked=("n_threads", "n_ubatch"), found={"n_threads": tuning().found["n_threads"]}), header, HERE, given)
    known = recorded(header, HERE, open_settings())
    assert known is not None
    assert dict(known.found) == dict(tuning().found)


def test_nothing_is_kept_where_nothing_can_be_written(header: GgufHeader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_HOME", "/dev/null")
    assert keep(tuning(), header, HERE, open_settings()) == tuning()


def test_the_reason_names_the_figures() -> None:
    generation, prompt = as_settings(tuning(), HERE)
    assert (generation.value, generation.origin) == (1, "tuned")
    assert generation.reason == "1 of 4 CPUs: measured 512 t/s against 301 with 2"
    assert prompt.reason == "all 4 CPUs that we may use: measured 181 t/s, about as 180 with 2"
    unsteady = as_settings(tuning(crowded=True, others=1.5), HERE)[0].reason
    assert unsteady.endswith("(unsteady: other work on 1.5 CPUs, bursts off by 0 %)")


def test_without_a_measurement_the_threads_are_what_the_kernel_grants() -> None:
    assert as_settings(None, HERE) == tuned_threads(HERE)
    assert [(each.value, each.reason) for each in tuned_threads(HERE)] == [
        (2, "2 of 4 CPUs: one per physical core"),
        (4, "all 4 CPUs that we may use"),
    ]


def test_what_was_just_measured_reads_as_it_does_later(header: GgufHeader) -> None:
    settings = open_settings()
    measured = tuning(found={**tuning().found, "n_threads": found(1, {1: 19159.4951, 2: 301.0})})
    kept = keep(measured, header, HERE, settings)
    assert kept == recorded(header, HERE, settings)
    assert kept.found["n_threads"].rate(1) == 19159.5


def test_a_record_can_be_read_by_others(header: GgufHeader) -> None:
    settings = open_settings()
    keep(tuning(), header, HERE, settings)
    known = json.loads(record_path(header, HERE, settings).read_text())
    assert known["found"]["n_threads"]["value"] == 1
    assert known["settled"] is True


def test_caches_that_cpus_share_are_counted_once(tmp_path: Path) -> None:
    """Four CPUs, two and two behind one L3 of 32 MiB; each CPU has an L2 and an L1 of instructions."""
    for cpu in range(4):
        for index, (level, size, shared, kind) in enumerate(
            [
                ("1", "32K", str(cpu), "Instruction"),
                ("2", "1024K", str(cpu), "Unified"),
                ("3", "32768K", "0-1" if cpu < 2 else "2-3", "Unified"),
            ]
        ):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            for name, text in {"level": level, "size": size, "shared_cpu_list": shared, "type": kind}.items():
                (folder / name).write_text(f"{text}\n")
    assert cache_bytes(tmp_path) == 64 << 20
    assert cache_bytes(tmp_path / "nowhere") == 0


SMALL = machine(cpus=2, cores=2, available_bytes=64 << 20)
"""So little memory is free that the buffer is a few MiB."""


def bandwidth_record() -> Path:
    (path,) = (files.foundry_home() / "tune").iterdir()
    return path


def test_the_bandwidth_is_kept_for_each_number_of_threads() -> None:
    assert recorded_bandwidth(SMALL) is None
    measured = read_bandwidth(SMALL)
    assert measured > 1e8
    assert recorded_bandwidth(SMALL) == measured
    assert recorded_bandwidth(SMALL, threads=1) is None
    assert recorded_bandwidth(replace(SMALL, cpus=4)) is None
    bandwidth_record().write_text("{")
    assert recorded_bandwidth(SMALL) is None


def test_a_bandwidth_measured_beside_other_work_is_measured_again_and_the_best_stays() -> None:
    read_bandwidth(SMALL)
    note = json.loads(bandwidth_record().read_text())
    for attempts, was_crowded, measured_again in ((1, True, True), (ATTEMPTS, True, False), (1, False, False)):
        told = {**note, "bytes_per_s": 10**15, "crowded": was_crowded, "attempts": attempts}
        bandwidth_record().write_text(json.dumps(told))
        assert read_bandwidth(SMALL) == 1e15
        assert (json.loads(bandwidth_record().read_text())["attempts"] == attempts + 1) is measured_again


@pytest.mark.parametrize(
    ("cpus", "threads", "others", "answer"),
    [(2, 2, 0.1, False), (2, 2, 0.5, True), (2, 1, 0.9, False), (64, 8, 50.0, False), (64, 8, 60.0, True)],
)
def test_other_work_is_a_crowd_when_it_leaves_too_few_cpus(
    cpus: int, threads: int, others: float, answer: bool
) -> None:
    assert crowded(machine(cpus=cpus), threads, others) is answer
