"""What the search promises: nothing more would fit, what it offers instead does, and the library has the last word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.memory.devices import devices_described, devices_here
from runtime.memory.footprint import BufferBytes, Demand, Placement, footprint
from runtime.memory.plan import Request, plan_memory
from runtime.settings import Value
from tests.described import machine
from tests.described_models import known
from tests.unit.test_plan_cases import CASES, CPU, CUDA, LAPTOP, PI, Case


@pytest.mark.parametrize("name", ["16+16 GB, 30B at Q6_K", "8 GB, heads of 80, 32k", "24 GB, 70B", "24 GB, Mixtral"])
def test_not_one_layer_more_would_fit(name: str) -> None:
    case = CASES[name]
    plan = case.plan()
    same: dict[str, Value] = {
        "n_ubatch": plan.demand.n_ubatch,
        "n_ctx": plan.demand.n_ctx,
        "type_k": "f16",
        "type_v": "f16",
    }
    if plan.cpu_expert_layers:
        more: dict[str, Value] = {"n_cpu_moe": plan.cpu_expert_layers - 1, "n_gpu_layers": -1}
    else:
        more = {"n_gpu_layers": plan.choice.layout.n_gpu_layers + 1}
    assert not case.plan(**same, **more).fits


def test_what_was_said_to_fit_instead_fits() -> None:
    assert CASES["laptop, 8B, 128k"].plan(n_ctx=65536).fits
    assert CASES["8 GB, all layers asked"].plan(n_gpu_layers=27).fits
    assert Case(model="llama-30b", mix="Q6_K", vram=("16GiB@448",), ram=LAPTOP).plan().fits
    assert Case(model="llama-8b", mix="Q5_K_M", ram=PI).plan().fits


def test_a_cache_type_without_a_fast_kernel_is_warned_of_where_it_was_asked_for() -> None:
    slow = Case(model="llama-8b", ram=LAPTOP).plan(type_k="q8_0", type_v="q8_0")
    assert "no fast attention kernel for a q8_0/q8_0 cache on CPU" in slow.warnings[0]
    card = Case(model="llama-8b", vram=("24GiB",), ram=LAPTOP)
    assert card.plan(type_k="q8_0", type_v="q8_0").warnings == ()
    assert "q8_0/q4_0 cache on CUDA" in card.plan(type_k="q8_0", type_v="q4_0").warnings[0]


def test_what_rides_along_takes_its_place() -> None:
    case = CASES["8 GB, 8B"]
    here = devices_here(machine(), CPU)
    devices = devices_described(ram=case.ram, vram=case.vram, unified=None, here=here)
    request = Request(mmproj_bytes=1 << 30, adapter_bytes=320 << 20)
    plan = plan_memory([known("llama-8b")], devices, request, build=CUDA)
    card = plan.devices[1]
    assert (card.mmproj_bytes, card.adapters_bytes) == (3 << 29, 320 << 20)
    assert card.left_bytes >= 0


def test_a_plan_for_several_replies_counts_the_sequences_that_the_engine_makes() -> None:
    here = devices_here(machine(), CPU)
    for sequences, made in ((1, (1, 16, False)), (4, (5, 16, True)), (100, (17, 17, True))):
        demand = plan_memory([known("llama-8b")], here, Request(sequences=sequences), build=CPU).demand
        assert (demand.n_seq_max, demand.n_outputs_max, demand.kv_unified) == made


def test_the_library_has_the_last_word() -> None:
    case = CASES["8 GB, 8B"]
    here = devices_here(machine(), CPU)
    devices = devices_described(ram=case.ram, vram=case.vram, unified=None, here=here)

    def heavier(demand: Demand, placement: Placement) -> tuple[BufferBytes, ...]:
        host, card = footprint([known("llama-8b")], demand, placement, 1)
        return host, replace(card, compute=card.compute + (3 << 30 if placement.n_gpu_layers > 20 else 0))

    plan = plan_memory([known("llama-8b")], devices, Request(), build=CUDA, ask=heavier)
    assert (plan.exact, plan.fits) == (True, True)
    assert plan.choice.layout.n_gpu_layers < 33
    assert plan.devices[1].left_bytes >= 0
