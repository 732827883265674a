"""How fast a model would run in a given layout: bytes that generation reads and operations that a prompt takes.

Generation reads every weight in use once for each token (of experts, those that are used), and half of a full cache, at
the device's bandwidth; each layer costs a fixed time and each change of device a copy with a wait. A prompt takes two
operations for each weight in use and token; where host layers go with a GPU, each micro-batch copies their weights
over the bus instead (llama.cpp's op_offload, from 32 tokens on). It is an expectation: good to a third for generation
on devices of known bandwidth, to a factor of two for prompts and where a bandwidth is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runtime.memory.devices import Device
from runtime.memory.footprint import Demand, ModelBytes
from runtime.memory.layout import Layout

TURN: Final = (1024, 256)
"""Tokens of prompt and of reply by which layouts are compared."""

_ACHIEVED: Final = 0.8  # of a peak bandwidth; what was measured counts in full
_THREAD_BYTES_S: Final = 13e9  # K-quants unpacked by one core with AVX2: 291M parameters, 142 t/s on two cores
_THREAD_FLOPS: Final = 40e9  # prompts of a 7B at Q4 on 8 cores with AVX2: about 25 t/s
_HOST_FLOPS_PER_BYTE_S: Final = 8.0  # where threads are unknown: 8 such cores at 40 GB/s
_GPU_FLOPS_PER_BYTE_S: Final = 60.0  # published 7B prompts: 45 (H100) to 160 (RTX 4090) operations for each byte/s
_TENSOR_CORES: Final = 2.0  # over the f32 peak: 2.4 on an RTX 3060, 1.8 on an RTX 3090, 2.2 on an H100
_LAYER_S: Final = {"cpu": 15e-6, "gpu": 45e-6, "unified": 45e-6}  # launches and barriers of one layer and token
_SWITCH_S: Final = 25e-6  # a hidden state to another device
_BUS_BYTES_S: Final = 12e9  # PCIe 3.0 x16 or 4.0 x8
_FULL_BATCH: Final = 128  # tokens of micro-batch at which a GPU reaches half of its rate


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second; ``basis`` says what the figures rest on."""

    generation_tps: float
    prompt_tps: float
    basis: str

    @property
    def turn_s(self) -> float:
        prompt, reply = TURN
        return prompt / self.prompt_tps + reply / self.generation_tps


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a token takes of a model: ``used`` of the experts, ``params`` multiplied by (embedding left out)."""

    used: float
    params: float


def predict(table: ModelBytes, work: Work, demand: Demand, layout: Layout, devices: Sequence[Device]) -> Speed:
    """Of a model with ``table`` in ``layout`` on ``devices`` (host first, or the one unified device)."""
    places = _places(devices)
    read, stored, layers, switches, before = [0.0] * len(places), 0.0, [0] * len(places), 0, -1
    for index in range(layout.n_all):
        at = layout.device_of(index)
        switches, before = switches + (at != before and before >= 0), at
        layers[at] += 1
        if index == len(table.layers):
            read[at] += table.output
            stored += 0 if at else table.output
            continue
        layer = table.layers[index]
        read[at] += layer.dense + layer.kv / 2
        away = 0 if layer.experts and index < layout.host_experts else at
        read[away] += layer.experts * work.used
        switches += 2 * (away != at)
        stored += (0 if at else layer.dense) + (0 if away else layer.experts)
    token_s = switches * _SWITCH_S
    for device, amount, count in zip(places, read, layers, strict=True):
        token_s += amount / _bytes_s(device) + count * _LAYER_S[device.kind]
    fixed_s = sum(count * _LAYER_S[device.kind] for device, count in zip(places, layers, strict=True))
    prompt_s = _prompt_s(read, stored, work, demand, places, fixed_s)
    return Speed(generation_tps=1 / token_s, prompt_tps=1 / prompt_s, basis=_basis(places, read))


def _prompt_s(
    read: Sequence[float], stored: float, work: Work, demand: Demand, places: Sequence[Device], fixed_s: float
) -> float:
    """Seconds for each token of a long prompt; ``fixed_s`` goes into each micro-batch."""
    batch = min(demand.n_ubatch, demand.n_batch, demand.n_ctx)
    total = sum(read) or 1.0
    copies = len(places) > 1 and places[0].kind == "cpu" and batch >= 32
    seconds = fixed_s
    for number, (device, amount) in enumerate(zip(places, read, strict=True)):
        operations = 2 * work.params * batch * amount / total
        if number == 0 and copies and amount:
            seconds += stored / _BUS_BYTES_S + operations / _flops(places[1], batch)
        else:
            seconds += operations / _flops(device, batch)
    return seconds / batch


def _places(devices: Sequence[Device]) -> Sequence[Device]:
    """Host and GPUs by number; a unified device is both."""
    return (devices[0], devices[0]) if devices[0].kind == "unified" else devices


def _bytes_s(device: Device) -> float:
    rate = device.bandwidth_bytes_s * (1.0 if device.measured else _ACHIEVED)
    if device.kind == "cpu" and device.threads:
        rate = min(rate, device.threads * _THREAD_BYTES_S)
    return rate


def _flops(device: Device, batch: int) -> float:
    if device.kind == "cpu":
        return device.threads * _THREAD_FLOPS if device.threads else device.bandwidth_bytes_s * _HOST_FLOPS_PER_BYTE_S
    factor = _TENSOR_CORES if device.tensor_cores else 1.0
    full = device.flops * factor if device.flops else device.bandwidth_bytes_s * _GPU_FLOPS_PER_BYTE_S
    if device.kind == "unified":
        full = device.bandwidth_bytes_s * _GPU_FLOPS_PER_BYTE_S / 2
    return full * batch / (batch + _FULL_BATCH)


def _basis(places: Sequence[Device], read: Sequence[float]) -> str:
    """Such as ``host 21 GB/s measured, RTX 3090 936 GB/s bus width and clock``."""
    used = {device.name: device for device, amount in zip(places, read, strict=True) if amount}
    parts = [
        f"{name} {device.bandwidth_bytes_s / 1e9:.0f} GB/s ({device.bandwidth_origin})" for name, device in used.items()
    ]
    return "computed from bytes read per token: " + ", ".join(parts)
