"""Where a model can lie: the host and its GPUs, with what is free of each, what must stay free, and how fast it is.

Figures come from this machine (``devices_here``) or from what was typed for another one (``devices_described``).
Whatever is assumed says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from runtime.memory.kernels import Backend, Build
from toolchain.base.errors import UsageError
from toolchain.base.gpu import Gpu
from toolchain.base.machine import Machine

DeviceKind: TypeAlias = Literal["cpu", "gpu", "unified"]

GIB: Final = 1 << 30
MIB: Final = 1 << 20

GPU_MARGIN_BYTES: Final = 512 * MIB
"""What a context takes of a GPU beside llama.cpp's own buffers, none of which a header tells: the driver's context with
the kernels loaded (some 300 to 500 MiB on recent cards), cuBLAS's workspace (32 MiB on sm_90, says its manual) and the
pool for unpacked matrices (ggml_cuda_pool in ggml-cuda.cu). llama.cpp's own --fit leaves 1 GiB (common/common.h)."""

GPU_MARGIN_SHARE: Final = 0.02
"""Of the whole memory, for pieces that do not fit together."""

HOST_MARGIN_BYTES: Final = (128 * MIB, 512 * MIB)
"""A sixteenth of the whole memory within these bounds: the interpreter with the library and a vocabulary (some
100 MiB), and pages that the rest of the system lives on."""

_GPU_IDLE_BYTES: Final = 256 * MIB  # a described GPU: the driver's own part
_HOST_RESERVE: Final = (768 * MIB, 0.05)  # a described host: its system and services, a quarter of it at most
_HOST_BANDWIDTH: Final = 40e9  # two channels of DDR4-3200 give 51 GB/s at most, four fifths of it to a program
_GPU_BANDWIDTH_PER_GIB: Final = 40e9  # 12 GB cards read 360 to 500 GB/s, 24 GB cards 936 to 1008
_GPU_BANDWIDTH_MOST: Final = 2e12

# Apple's published memory bandwidths in GB/s, by the chip's name
_APPLE: Final = {
    **{"M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800, "M2": 100, "M2 Pro": 200, "M2 Max": 400},
    **{"M2 Ultra": 800, "M3": 100, "M3 Pro": 150, "M3 Max": 300, "M3 Ultra": 819, "M4": 120, "M4 Pro": 273},
    "M4 Max": 410,
}
# "shared_memory" of NVIDIA's Jetson data sheets in GB/s
_JETSON: Final = {"Orin": 204, "Xavier": 137, "Thor": 273}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One memory. Of ``free_bytes``, ``margin_bytes`` stay free. A ``unified`` one is host and GPU in one pool, of
    which the GPU gets at most ``gpu_limit_bytes``.

    ``bandwidth_bytes_s`` reads; ``bandwidth_origin`` says where the figure is from. ``flops`` is the f32 peak of a GPU,
    0.0 when unknown; ``threads`` are a host's for generation, 0 when unknown.
    """

    name: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int
    margin_bytes: int
    bandwidth_bytes_s: float
    bandwidth_origin: str
    backend: Backend = "CPU"
    gpu_limit_bytes: int | None = None
    flops: float = 0.0
    tensor_cores: bool = True
    threads: int = 0

    @property
    def usable_bytes(self) -> int:
        """What a plan may fill."""
        return max(0, self.free_bytes - self.margin_bytes)

    @property
    def measured(self) -> bool:
        return self.bandwidth_origin.startswith("measured")


@dataclass(frozen=True, kw_only=True)
class LibraryGpu:
    """One GPU as the library counts it, with its memory in bytes, 0 where its driver does not tell. An ``integrated``
    one uses the host's."""

    name: str
    total_bytes: int
    free_bytes: int
    integrated: bool


def devices_here(machine: Machine, build: Build, *, host_bandwidth: float | None = None) -> tuple[Device, ...]:
    """The host first, then each GPU that ``build`` can use; one unified device where they share their memory.

    ``host_bandwidth`` is what was measured here, in bytes a second.
    """
    threads = machine.generation_threads.count
    origin = "measured" if host_bandwidth else "assumed"
    host_rate = host_bandwidth or _HOST_BANDWIDTH
    if machine.system == "Darwin" and machine.arch == "arm64" and "Metal" in build.backends:
        chip = machine.cpu_model.removeprefix("Apple ").strip()
        rate = _APPLE.get(chip, 100) * 1e9
        return (_unified(chip, machine.ram_bytes, machine.available_bytes, rate, "Apple's figure", "Metal", threads),)
    shared = next((gpu for gpu in machine.gpus if gpu.shares_memory), None)
    if shared is not None and build.gpu_backend:
        known = next((rate for name, rate in _JETSON.items() if name.lower() in shared.name.lower()), 100)
        rate = shared.bandwidth_bytes_s or known * 1e9
        total, free = machine.ram_bytes, machine.available_bytes
        return (_unified(shared.name, total, free, rate, "NVIDIA's figure", build.gpu_backend, threads),)
    host = _host("host", machine.ram_bytes, machine.available_bytes, host_rate, origin, threads)
    if build.gpu_backend is None or not knows_gpus(machine, build):
        return (host,)
    return (host, *(_card(gpu, build.gpu_backend) for gpu in machine.gpus))


def knows_gpus(machine: Machine, build: Build) -> bool:
    """Whether ``machine`` tells the GPUs that ``build`` uses, with their memory; else the library is to be asked.

    NVML tells NVIDIA's, and CUDA uses all of them; a slice of one (MIG) has memory that only CUDA tells.
    """
    if build.gpu_backend in (None, "Metal"):
        return True
    whole = all(gpu.memory_bytes or gpu.shares_memory for gpu in machine.gpus)
    return build.gpu_backend == "CUDA" and bool(machine.gpus) and whole


def with_library_gpus(here: tuple[Device, ...], told: Sequence[LibraryGpu], build: Build) -> tuple[Device, ...]:
    """``here``, a host, with the GPUs that the library ``told`` of; one unified device for an integrated GPU."""
    host, backend = here[0], build.gpu_backend
    known = [gpu for gpu in told if gpu.total_bytes]
    if backend is None or not known:
        return here
    if known[0].integrated:
        made = _unified(
            known[0].name,
            host.total_bytes,
            host.free_bytes,
            host.bandwidth_bytes_s,
            host.bandwidth_origin,
            backend,
            host.threads,
        )
        return (replace(made, gpu_limit_bytes=min(known[0].total_bytes, host.total_bytes)),)
    return (
        host,
        *(_card(Gpu(name=g.name, memory_bytes=g.total_bytes, free_bytes=g.free_bytes), backend) for g in known),
    )


def devices_described(
    *, ram: str | None, vram: Sequence[str], unified: str | None, here: tuple[Device, ...], backend: Backend = "CUDA"
) -> tuple[Device, ...]:
    """Another machine: ``ram``, ``vram`` (a text for each GPU, or several with commas; ``0``: none) or ``unified``.

    Each is ``16GiB`` or ``16GiB@51``, with a bandwidth in GB/s. What is not given is as on this machine, ``here``:
    where that has one memory for both, ``ram`` alone is another size of it, and with ``vram`` it is a host's.

    Raises UsageError for a text that is no size, and for ``unified`` beside another.
    """
    if unified is not None:
        if ram is not None or vram:
            raise UsageError("--unified is all the memory there is", hint="leave --ram and --vram away")
        size, rate = parse_size(unified, "--unified")
        backend = "Metal"
        return (_unified("unified", size, _after_reserve(size), rate or 100e9, _typed(rate), backend, 0),)
    cards = [text for given in vram for text in given.split(",")]
    gpus = here[1:] if not vram else ()
    whole = here[0].kind == "unified"
    if ram is None:
        host = _as_host(here[0]) if whole else here[0]
    else:
        size, rate = parse_size(ram, "--ram")
        if whole and not vram:
            same, free = here[0], _after_reserve(size)
            rate, origin = (rate, "as typed") if rate else (same.bandwidth_bytes_s, same.bandwidth_origin)
            return (_unified(same.name, size, free, rate, origin, same.backend, 0),)
        host = _host("host", size, _after_reserve(size), rate or _HOST_BANDWIDTH, _typed(rate), 0)
    for number, text in enumerate(cards):
        size, rate = parse_size(text, "--vram")
        if size:
            assumed = min(_GPU_BANDWIDTH_MOST, _GPU_BANDWIDTH_PER_GIB * size / GIB)
            free = size - min(_GPU_IDLE_BYTES, size // 16)
            gpus = (*gpus, _gpu(f"GPU {number}", size, free, rate or assumed, _typed(rate), backend))
    return (host, *gpus)


def parse_size(text: str, option: str) -> tuple[int, float]:
    """(bytes, bytes a second or 0.0) of ``16GiB@51``; G, GB and GiB all mean 2**30, as memory is sold."""
    found = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])i?B?)?\s*(?:@\s*(\d+(?:\.\d+)?)\s*(?:GB/s)?)?\s*", text, re.IGNORECASE
    )
    if found is None or (found[2] is None and float(found[1]) != 0):
        raise UsageError(f"{option}: {text!r} is no size", hint=f"{option} 16GiB, or {option} 16GiB@51 (GB/s)")
    scale = {"": 1, "K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}[(found[2] or "").upper()]
    return int(float(found[1]) * scale), float(found[3] or 0) * 1e9


def _as_host(unified: Device) -> Device:
    """The memory of a host with a GPU in it as a host's alone."""
    margin = _host_margin(unified.total_bytes)
    return replace(unified, name="host", kind="cpu", backend="CPU", gpu_limit_bytes=None, margin_bytes=margin)


def _typed(rate: float) -> str:
    return "as typed" if rate else "assumed"


def _after_reserve(size: int) -> int:
    fixed, share = _HOST_RESERVE
    return int(size - min(fixed, size // 4) - share * size)


def _host_margin(total: int) -> int:
    least, most = HOST_MARGIN_BYTES
    return max(least, min(most, total // 16))


def _host(name: str, total: int, free: int, rate: float, origin: str, threads: int) -> Device:
    return Device(
        name=name,
        kind="cpu",
        total_bytes=total,
        free_bytes=min(free, total),
        margin_bytes=_host_margin(total),
        bandwidth_bytes_s=rate,
        bandwidth_origin=origin,
        threads=threads,
    )


def _card(gpu: Gpu, backend: Backend) -> Device:
    assumed = min(_GPU_BANDWIDTH_MOST, _GPU_BANDWIDTH_PER_GIB * gpu.memory_bytes / GIB)
    rate, origin = gpu.bandwidth_bytes_s or assumed, "bus width and clock" if gpu.bandwidth_bytes_s else "assumed"
    made = _gpu(gpu.name, gpu.memory_bytes, gpu.free_bytes, rate, origin, backend)
    tensor_cores = gpu.capability is None or gpu.capability >= (7, 0)
    return replace(made, flops=gpu.flops, tensor_cores=tensor_cores)


def _gpu(name: str, total: int, free: int, rate: float, origin: str, backend: Backend) -> Device:
    return Device(
        name=name,
        kind="gpu",
        total_bytes=total,
        free_bytes=min(free, total),
        margin_bytes=GPU_MARGIN_BYTES + int(GPU_MARGIN_SHARE * total),
        bandwidth_bytes_s=rate,
        bandwidth_origin=origin,
        backend=backend,
    )


def _unified(name: str, total: int, free: int, rate: float, origin: str, backend: Backend, threads: int) -> Device:
    """Metal lets its GPU use two thirds of a small memory and three quarters of one beyond 36 GiB
    (MTLDevice.recommendedMaxWorkingSetSize, as llama.cpp prints it); a Jetson's all of it."""
    share = (0.75 if total > 36 * GIB else 2 / 3) if backend == "Metal" else 1.0
    return Device(
        name=name,
        kind="unified",
        total_bytes=total,
        free_bytes=min(free, total),
        margin_bytes=_host_margin(total),
        bandwidth_bytes_s=rate,
        bandwidth_origin=origin,
        backend=backend,
        gpu_limit_bytes=int(share * total),
        threads=threads,
    )
