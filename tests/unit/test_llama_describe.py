"""What LLaMa tells of memory is what was planned, on one GPU, on several, and on none."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.llama.describe import model_info, resources
from runtime.settings import settle
from tests.described import machine
from tests.described_models import known
from tests.generated_models import write_header
from tests.unit.test_plan_cases import CASES
from toolchain.base.gguf import read_header


@pytest.mark.parametrize("name", ["8 GB, 8B", "16+16 GB, 30B at Q6_K", "24 GB, Mixtral", "laptop, 8B, 128k"])
def test_bytes_on_host_and_gpus_are_the_plans(name: str) -> None:
    case = CASES[name]
    plan = case.plan()
    headers = [known(case.model)]
    settings = settle(machine=machine(), n_ctx_train=None, tuned=plan.settings)
    told = resources(headers, plan, settings)
    cards = [device for device in plan.devices if device.kind != "cpu"]
    assert told.vram_bytes == sum(device.used_bytes for device in cards)
    assert told.vram_bytes + told.ram_bytes == sum(device.used_bytes for device in plan.devices)
    assert told.gpu_layers == plan.choice.layout.n_gpu_layers
    assert told.layers == len(told.per_layer_bytes)
    assert told.expected_max_bytes > sum(told.per_layer_bytes) + told.output_layer_bytes
    if told.gpu_layers == told.layers + 1 and not plan.cpu_expert_layers and len(cards) == 1:
        assert told.vram_bytes == pytest.approx(told.expected_max_bytes, rel=0.02)


def test_header_of_experts_is_told(tmp_path: Path) -> None:
    header = read_header(write_header(tmp_path / "moe.gguf", "qwen3moe", n_expert=8, n_expert_used=2, n_head_kv=2))
    told = model_info([header])
    assert (told.architecture, told.experts, told.experts_used, told.kv_heads) == ("qwen3moe", 8, 2, 2)
    assert not told.has_chat_template
    assert told.parameters == header.n_params
