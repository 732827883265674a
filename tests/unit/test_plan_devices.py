"""Devices: of a machine, and in the words of the command line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.memory.devices import (
    Device,
    LibraryGpu,
    devices_described,
    devices_here,
    knows_gpus,
    parse_size,
    with_library_gpus,
)
from runtime.memory.here import plan_here
from runtime.memory.kernels import Build
from tests.described import machine
from tests.described_models import known
from toolchain.base.errors import UsageError
from toolchain.base.gpu import Gpu

GIB = 1 << 30
CPU = Build(backends=frozenset({"CPU"}))
CUDA = Build(backends=frozenset({"CPU", "CUDA"}))
CARD = Gpu(
    name="NVIDIA GeForce RTX 3090",
    memory_bytes=24 * GIB,
    free_bytes=23 * GIB,
    capability=(8, 6),
    bandwidth_bytes_s=936e9,
    flops=35.6e12,
)


def other(**changes: object) -> tuple[Device, ...]:
    given: dict[str, object] = {"ram": None, "vram": (), "unified": None, **changes}
    return devices_described(here=devices_here(machine(gpus=(CARD,)), CUDA), **given)  # type: ignore[arg-type]


def test_a_gpu_is_planned_on_what_is_free_of_it_now() -> None:
    host, card = devices_here(machine(gpus=(CARD,)), CUDA, host_bandwidth=21e9)
    assert (card.kind, card.total_bytes, card.free_bytes) == ("gpu", 24 * GIB, 23 * GIB)
    assert 0.9 * GIB < card.margin_bytes < 1.1 * GIB
    assert card.bandwidth_bytes_s == 936e9
    assert (host.bandwidth_bytes_s, host.bandwidth_origin) == (21e9, "measured")


def test_a_build_without_gpus_uses_none() -> None:
    assert [device.kind for device in devices_here(machine(gpus=(CARD,)), CPU)] == ["cpu"]


def test_a_jetson_has_one_memory() -> None:
    orin = Gpu(name="Orin", capability=(8, 7), shares_memory=True)
    (device,) = devices_here(machine(gpus=(orin,), ram_bytes=8 * GIB, available_bytes=7 * GIB), CUDA)
    assert (device.kind, device.backend, device.gpu_limit_bytes) == ("unified", "CUDA", 8 * GIB)


def test_a_mac_has_one_memory_and_its_gpu_not_all_of_it() -> None:
    metal = Build(backends=frozenset({"CPU", "Metal"}))
    mac = machine(system="Darwin", arch="arm64", cpu_model="Apple M2 Max", ram_bytes=64 * GIB)
    (device,) = devices_here(mac, metal)
    assert (device.kind, device.bandwidth_bytes_s, device.gpu_limit_bytes) == ("unified", 400e9, 48 * GIB)


def test_another_machine_in_words() -> None:
    host, first, second = other(ram="16GiB@51", vram=("24GiB@936,8GB",))
    assert (host.total_bytes, host.bandwidth_bytes_s, host.bandwidth_origin) == (16 * GIB, 51e9, "as typed")
    assert host.free_bytes < host.total_bytes
    assert (first.total_bytes, first.bandwidth_bytes_s) == (24 * GIB, 936e9)
    assert (second.total_bytes, second.bandwidth_origin) == (8 * GIB, "assumed")


def test_what_is_not_said_is_as_here() -> None:
    assert [device.name for device in other(ram="16GiB")] == ["host", CARD.name]
    assert [device.total_bytes for device in other(vram=("8GiB",))] == [64 * GIB, 8 * GIB]
    assert [device.kind for device in other(vram=("0",))] == ["cpu"]


@pytest.mark.parametrize("text", ["", "16", "lots", "16GiB@", "-1GiB", "16GiB@fast", "16XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--ram"):
        parse_size(text, "--ram")


def test_one_memory_beside_another_is_refused() -> None:
    with pytest.raises(UsageError, match="--unified"):
        other(unified="64GiB", ram="16GiB")


def test_gpus_that_nvml_does_not_describe_are_told_by_the_library() -> None:
    vulkan = Build(backends=frozenset({"CPU", "Vulkan"}))
    slices = machine(gpus=(replace(CARD, memory_bytes=0, free_bytes=0),))
    assert knows_gpus(machine(gpus=(CARD,)), CUDA)
    assert not knows_gpus(slices, CUDA)
    assert not knows_gpus(machine(), vulkan)
    told = LibraryGpu(name="Radeon", total_bytes=16 * GIB, free_bytes=15 * GIB, integrated=False)
    _host, card = with_library_gpus(devices_here(machine(), vulkan), [told], vulkan)
    assert (card.name, card.backend, card.free_bytes) == ("Radeon", "Vulkan", 15 * GIB)
    inside = replace(told, total_bytes=32 * GIB, integrated=True)
    (shared,) = with_library_gpus(devices_here(machine(), vulkan), [inside], vulkan)
    assert (shared.kind, shared.total_bytes, shared.gpu_limit_bytes) == ("unified", 64 * GIB, 32 * GIB)


def test_a_gpu_that_nobody_can_size_is_said_and_not_filled() -> None:
    slices = machine(gpus=(replace(CARD, memory_bytes=0, free_bytes=0),))
    planned = plan_here([known("llama-8b")], {}, slices, build=CUDA)
    for plan in (planned.plan, planned.again(planned.lessons).plan):
        assert [device.kind for device in plan.devices] == ["cpu"]
        (layers,) = (each for each in plan.settings if each.name == "n_gpu_layers")
        assert layers.value == 0
        assert "are not planned for: " in plan.warnings[0]  # with what the library said, or that it is not built yet


def test_a_build_without_a_gpu_backend_says_so_in_every_plan() -> None:
    planned = plan_here([known("llama-8b")], {}, machine(gpus=(CARD,)), build=CPU)
    for each in (planned, planned.again(planned.lessons), planned.asking()):
        assert [setting.value for setting in each.plan.settings if setting.name == "n_gpu_layers"] == [0]
        assert sum("no GPU backend" in warning for warning in each.plan.warnings) == 1
    assert any("was not asked" in note for note in planned.asking().plan.notes)


def test_a_card_beside_a_machine_of_one_memory() -> None:
    metal = Build(backends=frozenset({"CPU", "Metal"}))
    mac = devices_here(machine(system="Darwin", arch="arm64", cpu_model="Apple M2 Max"), metal)
    host, card = devices_described(ram=None, vram=("24GiB",), unified=None, here=mac)
    assert (host.kind, host.backend, host.gpu_limit_bytes, card.kind) == ("cpu", "CPU", None, "gpu")
    (smaller,) = devices_described(ram="32GiB", vram=(), unified=None, here=mac)
    assert (smaller.kind, smaller.total_bytes, smaller.bandwidth_bytes_s) == ("unified", 32 * GIB, 400e9)
