"""What loads taught: read from the library's own lines, kept on disk, and used in the next plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.library_log import LibraryLog
from runtime.memory.back_off import Started, load_with_back_off, stage_of, still_possible
from runtime.memory.devices import devices_described, devices_here
from runtime.memory.footprint import Demand, Placement, footprint
from runtime.memory.here import Planned, plan_here
from runtime.memory.learned import Lessons, lessons_for, made_buffers
from runtime.memory.plan import Request, plan_memory
from runtime.settings import Settings, settle
from tests.described import machine
from tests.described_models import known
from tests.unit.test_plan_cases import CASES, CPU, CUDA
from toolchain.base.errors import MemoryFitError

MIB = 1 << 20
LOG = """\
load_tensors:   CPU_Mapped model buffer size =   281.81 MiB
load_tensors:        CUDA0 model buffer size =  4403.49 MiB
llama_kv_cache:      CUDA0 KV buffer size =   512.00 MiB
sched_reserve:      CUDA0 compute buffer size =   158.50 MiB
sched_reserve:  CUDA_Host compute buffer size =    20.01 MiB
""".splitlines()
DEVICES = (("host", 16 << 30), ("GPU 0", 8 << 30))
DEMAND, ALL = Demand(n_ctx=4096), Placement(n_gpu_layers=33)


def computed() -> tuple[int, ...]:
    return tuple(each.compute for each in footprint([known("llama-8b")], DEMAND, ALL, 1))


def taught(lessons: Lessons) -> Lessons:
    made = made_buffers(LOG, 1)
    assert made is not None
    return lessons.with_load(DEMAND, ALL, footprint([known("llama-8b")], DEMAND, ALL, 1), made)


def test_buffers_are_read_from_the_librarys_log() -> None:
    made = made_buffers(LOG, 1)
    assert made is not None
    assert [round(size / MIB) for size in made["kv"]] == [0, 512]
    assert [round(size / MIB) for size in made["compute"]] == [20, 159]
    assert made_buffers(["sched_reserve: CUDA1 compute buffer size = 1.00 MiB"], 1) is None
    assert made_buffers(["something else"], 1) is None


def test_the_same_load_gets_the_sizes_that_it_had() -> None:
    buffers = footprint([known("llama-8b")], DEMAND, ALL, 1)
    card = taught(Lessons()).corrected(DEMAND, ALL, buffers)[1]
    assert round(card.compute / MIB, 1) == 158.5


def test_only_the_context_that_was_begun_last_is_learned_from() -> None:
    log = LibraryLog(shown=False)
    for _ in ("the tuner's context", "the real one"):
        log.begin()
        for line in LOG[2:]:
            log.write(2, f"{line}\n".encode())
    assert made_buffers(log.lines(), 1) == made_buffers(LOG, 1)


def test_evidence_is_of_the_operation_that_failed_however_long_the_log() -> None:
    log = LibraryLog(shown=False)
    log.write(3, b"llama_context: an older warning\n")
    log.begin()
    assert log.tail() == ""
    log.write(4, b"failed to allocate\n")
    assert log.tail() == "failed to allocate"
    for number in range(5000):
        log.write(2, f"{number}\n".encode())
    assert len(log.lines()) == 2000


def test_a_cache_that_the_log_only_rounds_keeps_its_computed_bytes() -> None:
    buffers = footprint([known("llama-8b")], DEMAND, ALL, 1)
    assert taught(Lessons()).corrected(DEMAND, ALL, buffers)[1].kv == buffers[1].kv
    made = made_buffers([line.replace("512.00", "640.00") for line in LOG], 1)
    assert made is not None
    larger = Lessons().with_load(DEMAND, ALL, buffers, made).corrected(DEMAND, ALL, buffers)
    assert round(larger[1].kv / MIB) == 640


def test_other_loads_are_raised_by_the_ratio_and_never_lowered() -> None:
    lessons, other = taught(Lessons()), Demand(n_ctx=8192)
    buffers = footprint([known("llama-8b")], other, ALL, 1)
    corrected = lessons.corrected(other, ALL, buffers)
    assert corrected[1].compute / buffers[1].compute == pytest.approx(158.5 * MIB / computed()[1], rel=0.01)
    assert all(new.compute >= old.compute for new, old in zip(corrected, buffers, strict=True))


def test_lessons_are_kept_for_the_same_model_devices_and_build() -> None:
    taught(lessons_for([known("llama-8b")], DEVICES, "build")).with_shortfall("GPU 0", 7 << 30).keep()
    again = lessons_for([known("llama-8b")], DEVICES, "build")
    assert again.of(DEMAND, ALL, 2) is not None
    assert again.most_bytes("GPU 0") == 7 << 30
    for model, devices, build in (
        ("llama-1b", DEVICES, "build"),
        ("llama-8b", DEVICES[:1], "build"),
        ("llama-8b", DEVICES, "x"),
    ):
        assert lessons_for([known(model)], devices, build).loads == ()


def test_a_shortfall_is_forgotten_in_time() -> None:
    lessons = Lessons().with_shortfall("GPU 0", 7 << 30)
    until = lessons.shortfalls[0].until
    assert lessons.most_bytes("GPU 0", now=until - 1) == 7 << 30
    assert lessons.most_bytes("GPU 0", now=until + 1) is None
    (told,) = lessons.limits(["host", "GPU 0"])
    assert told.startswith("GPU 0 is filled to 7.00 GiB at most since a load failed on 20")
    assert lessons.limits(["host"]) == lessons.limits(["GPU 0"], now=until + 1) == ()


def test_a_load_that_used_more_lifts_a_shortfall() -> None:
    first = card_of_8_gb()
    path = lessons_for([known("llama-8b")], DEVICES, "build").path
    short = replace(first.lessons, path=path).with_shortfall("GPU 0", 1 << 30)
    short.keep()
    assert lessons_for([known("llama-8b")], DEVICES, "build").shortfalls

    def load(settings: Settings, planned: Planned) -> Started[str]:
        return Started(loaded="engine", settings=settings, lines=())

    limited, doubting = first.again(short), first.again(short.doubted())
    assert limited.plan.choice.layout.n_gpu_layers < doubting.plan.choice.layout.n_gpu_layers
    load_with_back_off(limited, settled(limited), load, settle=settled)
    assert lessons_for([known("llama-8b")], DEVICES, "build").shortfalls
    load_with_back_off(doubting, settled(doubting), load, settle=settled)
    assert lessons_for([known("llama-8b")], DEVICES, "build").shortfalls == ()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"form": 99, "loads": [], "shortfalls": []}',
        '{"form": 2, "loads": [{"asked": 7}], "shortfalls": [{"device": "GPU 0", "most_bytes": -1, "until": 9e99}]}',
        '{"form": 1, "loads": [{"asked": "x", "planned": [1], "compute": [2], "kv": [1]}], "shortfalls": []}',
        '{"form": 2, "loads": [{"asked": "x", "planned": [1], "compute": [1, 2], "kv": [1]}], "shortfalls": [3]}',
        '{"form": 2, "loads": [{"asked": "x", "planned": [true], "compute": ["1"], "kv": [1e300]}], "shortfalls": []}',
    ],
)
def test_damaged_lessons_are_as_if_there_were_none(content: str) -> None:
    path = lessons_for([known("llama-8b")], DEVICES, "build").path
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    assert lessons_for([known("llama-8b")], DEVICES, "build") == Lessons(path=path)


def test_lessons_that_cannot_be_written_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Lessons(path=tmp_path / "file" / "memory.json").keep()
    Lessons(path=tmp_path / "memory.json").keep()
    assert json.loads((tmp_path / "memory.json").read_text())["loads"] == []


@pytest.mark.parametrize(
    ("told", "stage"),
    [
        ("ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 314572800", "compute"),
        ("failed to initialize the context: failed to allocate buffer for kv cache", "cache"),
        ("alloc_tensor_range: failed to allocate CUDA0 buffer of size 4617289728", "weights"),
        (
            "llama_adapter_lora_init: failed to apply lora adapter: failed to allocate buffer for lora adapter",
            "compute",
        ),
    ],
)
def test_what_failed_is_read_from_the_librarys_words(told: str, stage: str) -> None:
    assert stage_of(told) == stage


def test_a_device_that_ran_out_is_filled_less_the_next_time() -> None:
    case = CASES["8 GB, 8B"]
    here = devices_here(machine(), CPU)
    devices = devices_described(ram=case.ram, vram=case.vram, unified=None, here=here)
    plan = plan_memory([known("llama-8b")], devices, Request(), build=CUDA)
    failure = MemoryFitError("it", evidence="alloc_tensor_range: failed to allocate CUDA0 buffer of size 4617289728")
    device, most = still_possible(failure, plan)
    assert device.name == "GPU 0"
    again = plan_memory(
        [known("llama-8b")], devices, Request(), build=CUDA, learned=Lessons().with_shortfall(device.name, most)
    )
    assert again.fits
    assert again.choice.layout.n_gpu_layers < plan.choice.layout.n_gpu_layers
    assert again.devices[1].used_bytes <= most


def test_the_name_of_the_file_does_not_tell_what_failed() -> None:
    evidence = "alloc_tensor_range: failed to allocate CUDA0 buffer of size 4617289728"
    plan = card_of_8_gb().plan
    named = MemoryFitError("compute-graph.gguf does not fit in memory", evidence=evidence)
    assert still_possible(named, plan) == still_possible(MemoryFitError("it", evidence=evidence), plan)


def test_the_second_load_is_settled_and_made_by_the_plan_with_less() -> None:
    first, seen = card_of_8_gb(), []

    def load(settings: Settings, planned: Planned) -> Started[str]:
        seen.append(planned)
        if len(seen) == 1:
            raise MemoryFitError("it", evidence="failed to allocate CUDA0 buffer of size 4617289728")
        return Started(loaded="engine", settings=settings, lines=())

    assert load_with_back_off(first, settled(first), load, settle=settled) == "engine"
    layers = [planned.plan.choice.layout.n_gpu_layers for planned in seen]
    assert layers[1] < layers[0]


def test_other_threads_alone_are_no_reason_to_load_again() -> None:
    first, loads = card_of_8_gb(), []

    def load(settings: Settings, planned: Planned) -> Started[str]:
        loads.append(settings)
        raise MemoryFitError("it", evidence="failed to allocate CUDA0 buffer of size 4617289728")

    def other_threads(_: Planned) -> Settings:
        return settled(first, n_threads="7")

    with pytest.raises(MemoryFitError):
        load_with_back_off(first, settled(first), load, settle=other_threads)
    assert len(loads) == 1


def card_of_8_gb() -> Planned:
    case = CASES["8 GB, 8B"]
    here = devices_here(machine(), CPU)
    devices = devices_described(ram=case.ram, vram=case.vram, unified=None, here=here)
    return plan_here([known("llama-8b")], {}, machine(), devices=devices, build=CUDA)


def settled(planned: Planned, **flags: str) -> Settings:
    return settle(machine=machine(), n_ctx_train=8192, tuned=planned.plan.settings, flags=dict(flags))
