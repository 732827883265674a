"""Thirty described machines and models: what the plan decides, and the reason that it gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from runtime.memory.devices import devices_described, devices_here
from runtime.memory.footprint import BufferBytes, Demand, Placement, adapter_compute, footprint
from runtime.memory.kernels import Build
from runtime.memory.plan import MemoryPlan, Request, plan_memory
from runtime.settings import Value
from tests.described import machine
from tests.described_models import known
from toolchain.base.gguf import TensorInfo

CPU = Build(backends=frozenset({"CPU"}))
CUDA = Build(backends=frozenset({"CPU", "CUDA"}))
METAL = Build(backends=frozenset({"CPU", "Metal"}))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A machine in the words of the command line, a model, what is asked for; what comes of it and a part of why.

    ``layers`` are those on GPUs, ``experts`` the layers whose experts stay on the host. A ``None`` fits nowhere.
    """

    model: str
    mix: str = "Q4_K_M"
    ram: str | None = None
    vram: tuple[str, ...] = ()
    unified: str | None = None
    asked: dict[str, Value] = field(default_factory=dict)
    layers: int | None = 0
    experts: int = 0
    split: str = ""
    n_ctx: int = 4096
    kv: str = "f16"
    why: str = ""

    def plan(self, **more: Value) -> MemoryPlan:
        build = METAL if self.unified else CUDA if self.vram else CPU
        here = devices_here(machine(), CPU)
        devices = devices_described(ram=self.ram, vram=self.vram, unified=self.unified, here=here)
        return plan_memory([known(self.model, self.mix)], devices, Request(settled={**self.asked, **more}), build=build)


PI = "8GiB@12"
LAPTOP = "16GiB@51"
CASES = {
    "raspberry pi, 1B": Case(
        model="llama-1b",
        ram=PI,
    ),
    "raspberry pi, 8B": Case(
        model="llama-8b",
        ram=PI,
    ),
    "raspberry pi, 8B at Q8_0": Case(
        model="llama-8b",
        mix="Q8_0",
        ram=PI,
        layers=None,
        why="the Q5_K_M of this model",
    ),
    "raspberry pi, hybrid": Case(
        model="lfm2-1.2b",
        ram=PI,
        asked={"n_ctx": 32768},
        n_ctx=32768,
    ),
    "laptop, 13B": Case(
        model="llama2-13b",
        ram=LAPTOP,
    ),
    "laptop, 30B MoE": Case(
        model="qwen3-30b-a3b",
        ram=LAPTOP,
        layers=None,
        why="the IQ3_XS of this model",
    ),
    "laptop, 8B, 128k": Case(
        model="llama-8b",
        ram=LAPTOP,
        asked={"n_ctx": 131072},
        layers=None,
        n_ctx=131072,
    ),
    "8 GB, 8B": Case(
        model="llama-8b",
        vram=("8GiB@272",),
        ram=LAPTOP,
        layers=33,
        why="all 33 layers: 5.57 of 7.75 GiB free",
    ),
    "8 GB, 8B, 32k": Case(
        model="llama-8b",
        vram=("8GiB@272",),
        ram=LAPTOP,
        asked={"n_ctx": 32768},
        layers=33,
        n_ctx=32768,
        kv="q8_0",
        why="6 more layers on the GPU than with f16, and a fast kernel",
    ),
    "8 GB, heads of 80, 32k": Case(
        model="head-80",
        vram=("8GiB@272",),
        ram=LAPTOP,
        asked={"n_ctx": 32768},
        layers=18,
        n_ctx=32768,
        why="the cache stays f16: layers on the host have no fast kernel for q8_0",
    ),
    "8 GB, 30B MoE": Case(
        model="qwen3-30b-a3b",
        vram=("8GiB@272",),
        ram="32GiB@51",
        layers=49,
        experts=32,
        why="experts leave the GPU before whole layers do",
    ),
    "8 GB, many experts": Case(
        model="deepseek-v2-lite",
        vram=("8GiB@272",),
        ram=LAPTOP,
        layers=28,
        experts=10,
        why="the cache stays f16: this build has no fast kernel for q8_0 with these heads",
    ),
    "8 GB, gemma": Case(
        model="gemma3-4b",
        vram=("8GiB@272",),
        ram=LAPTOP,
        asked={"n_ctx": 131072},
        layers=35,
        n_ctx=131072,
        why="all 35 layers",
    ),
    "12 GB, 13B": Case(
        model="llama2-13b",
        vram=("12GiB@360",),
        ram=LAPTOP,
        layers=41,
    ),
    "16+16 GB, 30B at Q6_K": Case(
        model="llama-30b",
        mix="Q6_K",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=32,
        n_ctx=2048,
        why="29 layers run on the host, which sets the speed",
    ),
    "16+16 GB, 30B at Q5_K_M": Case(
        model="llama-30b",
        mix="Q5_K_M",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=37,
        n_ctx=2048,
        why="37 of 61 layers",
    ),
    "16+16 GB, 30B at Q4_K_M": Case(
        model="llama-30b",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=42,
        n_ctx=2048,
        why="42 of 61 layers",
    ),
    "16+16 GB, Qwen3 32B at Q6_K": Case(
        model="qwen3-32b",
        mix="Q6_K",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=37,
        why="37 of 65 layers",
    ),
    "16+16 GB, Qwen3 32B at Q5_K_M": Case(
        model="qwen3-32b",
        mix="Q5_K_M",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=42,
    ),
    "16+16 GB, Qwen3 32B at Q4_K_M": Case(
        model="qwen3-32b",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=50,
    ),
    "16+16 GB, 30B at Q8_0": Case(
        model="llama-30b",
        mix="Q8_0",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=None,
        n_ctx=2048,
        why="the Q6_K of this model",
    ),
    "16 GB, 30B MoE": Case(
        model="qwen3-30b-a3b",
        vram=("16GiB@448",),
        ram=LAPTOP,
        layers=49,
        experts=9,
        why="the experts of 9 of 48 layers stay on the host",
    ),
    "24 GB, 30B": Case(
        model="qwen3-32b",
        vram=("24GiB@936",),
        ram="32GiB@51",
        layers=65,
    ),
    "24 GB, Mixtral": Case(
        model="mixtral-8x7b",
        vram=("24GiB@936",),
        ram="32GiB@51",
        layers=33,
        experts=6,
        why="weights of the host are copied to the GPU once for each micro-batch",
    ),
    "24 GB, gemma 27B, 32k": Case(
        model="gemma3-27b",
        vram=("24GiB@936",),
        ram="32GiB@51",
        asked={"n_ctx": 32768},
        layers=63,
        n_ctx=32768,
    ),
    "24 GB, 70B": Case(
        model="llama-70b",
        vram=("24GiB@936",),
        ram="64GiB@51",
        layers=44,
    ),
    "2x24 GB, 70B": Case(
        model="llama-70b",
        vram=("24GiB@936", "24GiB@936"),
        ram="64GiB@51",
        layers=81,
        split="41,40",
        why="layers on GPU 0, GPU 1",
    ),
    "2x24 GB, 8B": Case(
        model="llama-8b",
        vram=("24GiB@936,24GiB@936",),
        ram="64GiB@51",
        layers=33,
        split="33,0",
        why="GPU 1 is left out",
    ),
    "24+8 GB, 30B at Q6_K": Case(
        model="qwen3-32b",
        mix="Q6_K",
        vram=("24GiB@936,8GiB@272",),
        ram="64GiB@51",
        layers=65,
        split="58,7",
    ),
    "8+24 GB, 30B at Q5_K_M": Case(
        model="qwen3-32b",
        mix="Q5_K_M",
        vram=("8GiB@272,24GiB@936",),
        ram="64GiB@51",
        layers=65,
        split="0,65",
        why="GPU 0 is left out",
    ),
    "H100, 70B, 128k": Case(
        model="llama-70b",
        vram=("80GiB@3350",),
        ram="256GiB@300",
        asked={"n_ctx": 131072},
        layers=81,
        n_ctx=131072,
        kv="q8_0",
        why="3 more layers on the GPU than with f16",
    ),
    "H100, DeepSeek V3": Case(
        model="deepseek-v3",
        vram=("80GiB@3350",),
        ram="512GiB@300",
        layers=62,
        experts=52,
        why="compute buffers of deepseek2 models are estimated",
    ),
    "mac 16, 8B": Case(
        model="llama-8b",
        unified="16GiB@100",
        layers=33,
    ),
    "mac 16, 13B at Q8_0": Case(
        model="llama2-13b",
        mix="Q8_0",
        unified="16GiB@100",
        layers=32,
        n_ctx=1024,
        why="lowered from 4096: no more fits",
    ),
    "mac 64, 70B": Case(
        model="llama-70b",
        unified="64GiB@400",
        layers=81,
        why="all 81 layers: 41.6 of 60.0 GiB free",
    ),
    "mac 128, 70B, 128k": Case(
        model="llama-70b",
        unified="128GiB@546",
        asked={"n_ctx": 131072},
        layers=81,
        n_ctx=131072,
    ),
    "8 GB, all layers asked": Case(
        model="llama2-13b",
        vram=("8GiB@272",),
        ram=LAPTOP,
        asked={"n_gpu_layers": -1},
        layers=None,
        why="--n-gpu-layers 27",
    ),
    "8 GB, few layers asked": Case(
        model="llama-8b",
        vram=("8GiB@272",),
        ram=LAPTOP,
        asked={"n_gpu_layers": 10},
        layers=10,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_decided_and_why(case: Case) -> None:
    plan = case.plan()
    layout = plan.choice.layout
    said = [*(setting.reason for setting in plan.settings), *plan.notes, plan.instead]
    assert (layout.n_gpu_layers if plan.fits else None) == case.layers
    assert plan.demand.n_ctx == case.n_ctx
    assert (plan.demand.type_k, plan.demand.type_v) == (case.kv, case.kv)
    assert any(case.why in each for each in said), said
    if plan.fits:
        assert plan.cpu_expert_layers == case.experts
        assert case.split == next((str(each.value) for each in plan.settings if each.name == "tensor_split"), "")
        assert all(device.left_bytes >= 0 for device in plan.devices)
        assert plan.speed.generation_tps > 0
        assert plan.speed.prompt_tps > 0
    else:
        assert any(device.left_bytes < 0 for device in plan.devices)


def test_one_cache_type_that_was_asked_for_is_no_reason_for_the_other() -> None:
    plan = CASES["8 GB, 8B, 32k"].plan(type_k="q8_0")
    assert not [setting for setting in plan.settings if setting.name in ("type_k", "type_v")]


def test_compute_buffers_of_metal_are_said_to_be_estimates() -> None:
    assert any("Metal are estimated" in note for note in CASES["mac 16, 8B"].plan().notes)
    assert not any("are estimated" in note for note in CASES["8 GB, 8B"].plan().notes)


def test_the_library_is_asked_four_times_at_most() -> None:
    asked: list[Placement] = []

    def never_enough(demand: Demand, placement: Placement) -> tuple[BufferBytes, ...]:
        asked.append(placement)
        host, card = footprint([known("llama-8b")], demand, placement, 1)
        return host, replace(card, compute=card.compute + len(asked) * (4 << 30))

    case = CASES["8 GB, 8B"]
    devices = devices_described(ram=case.ram, vram=case.vram, unified=None, here=devices_here(machine(), CPU))
    plan = plan_memory([known("llama-8b")], devices, Request(), build=CUDA, ask=never_enough)
    assert not plan.fits
    assert len(asked) <= 4


def test_an_adapters_work_is_planned_for() -> None:
    pair = [
        TensorInfo(name=f"blk.0.ffn_up.weight.lora_{part}", shape=shape, type="F16", offset=0, nbytes=0)
        for part, shape in (("a", (4096, 16)), ("b", (16, 14336)))
    ]
    adapter = replace(known("llama-8b"), tensors=tuple(pair))
    case = CASES["8 GB, 8B"]
    devices = devices_described(ram=case.ram, vram=case.vram, unified=None, here=devices_here(machine(), CPU))
    plain, adapted = (
        plan_memory([known("llama-8b")], devices, Request(adapters=each), build=CUDA) for each in ((), (adapter,))
    )
    more = adapted.devices[1].compute_bytes - plain.devices[1].compute_bytes
    assert more == adapter_compute(adapter, 512) == 2 * (16 + 14336) * 512 * 4
