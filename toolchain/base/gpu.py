"""The NVIDIA GPUs and driver of this machine, as NVML tells them (it needs no CUDA context and no toolkit).

Other GPUs (Metal, Vulkan, HIP) are found by llama.cpp itself; only CUDA has to be known before a build.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. ``capability`` is its compute capability, (8, 9) for sm_89; None when only the kernel shows it.

    ``memory_bytes`` is 0 where it is not known (in one that is cut into MIG slices, CUDA gives a process one slice, not
    the card) or where the GPU ``shares_memory`` with the machine; ``free_bytes`` is
    what of it nobody uses now. ``bandwidth_bytes_s`` (reading its memory) and ``flops`` (f32, without tensor cores)
    are peaks that follow from its clocks; 0 where the driver does not tell.
    """

    name: str
    memory_bytes: int = 0
    capability: tuple[int, int] | None = None
    uuid: str = ""
    free_bytes: int = 0
    shares_memory: bool = False
    bandwidth_bytes_s: float = 0.0
    flops: float = 0.0

    @property
    def arch(self) -> str:
        """The architecture as nvcc numbers it, ``89``; empty when unknown."""
        return "{}{}".format(*self.capability) if self.capability else ""

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch})" if self.capability else self.name


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The NVIDIA driver: ``version`` as in 580.65.06, ``cuda`` the newest CUDA release that it runs, (13, 0)."""

    version: str
    cuda: tuple[int, int]


def probe_gpus(root: Path = Path("/")) -> tuple[tuple[Gpu, ...], Driver | None]:
    """The GPUs that a process here may use (CUDA_VISIBLE_DEVICES counts) and the driver, None without one.

    Without NVML, or below another ``root``, the kernel driver's files tell the names alone.
    """
    if root == Path("/") and (found := _ask_nvml()):
        gpus, driver = found
        return visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")), driver
    named = tuple(Gpu(name=name) for name in _names(root))
    return visible(named, os.environ.get("CUDA_VISIBLE_DEVICES") if root == Path("/") else None), None


def visible(gpus: tuple[Gpu, ...], wanted: str | None) -> tuple[Gpu, ...]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order: indices or UUID beginnings, up to the first that is neither. A
    slice of a GPU (``MIG-...``) may be one of any: then all stay, with memory unknown.

    Indices are NVML's, by PCI bus: the library is loaded with CUDA_DEVICE_ORDER so (CUDA_DEFAULTS in command.py). Where
    the user set another order, indices into unequal GPUs cannot be told apart from here, and any keeps them all (CUDA
    C++ Programming Guide, "CUDA Environment Variables").
    """
    if wanted is None:
        return gpus
    by_bus = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") == "PCI_BUS_ID"
    unequal = not by_bus and len({(gpu.capability, gpu.name) for gpu in gpus}) > 1
    kept: list[int] = []
    for item in filter(None, (part.strip() for part in wanted.split(","))):
        if item.isdigit():
            named = [int(item)] if int(item) < len(gpus) else []
        elif item.startswith("MIG-"):
            return tuple(replace(gpu, memory_bytes=0, free_bytes=0) for gpu in gpus)
        else:
            named = [number for number, gpu in enumerate(gpus) if gpu.uuid.startswith(item)]
        if not named:
            break
        kept += range(len(gpus)) if item.isdigit() and unequal else named
    return tuple(gpus[number] for number in dict.fromkeys(kept))


def _ask_nvml() -> tuple[tuple[Gpu, ...], Driver] | None:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # no driver: the 20 ms of importing the bindings are saved
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        driver = Driver(version=_text(pynvml.nvmlSystemGetDriverVersion()), cuda=(cuda // 1000, cuda % 1000 // 10))
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_describe(handle) for handle in handles), driver
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _describe(handle: object) -> Gpu:
    import pynvml

    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        memory_bytes, free_bytes, shares_memory = int(memory.total), int(memory.free), False
    except pynvml.NVMLError:  # GPUs that share the machine's memory have none of their own
        memory_bytes, free_bytes, shares_memory = 0, 0, True
    if _figure(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0]):
        memory_bytes, free_bytes = 0, 0
    bus_bits = _figure(lambda: pynvml.nvmlDeviceGetMemoryBusWidth(handle))
    memory_mhz = _figure(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM))
    cores = _figure(lambda: pynvml.nvmlDeviceGetNumGpuCores(handle))
    core_mhz = _figure(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))
    return Gpu(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=memory_bytes,
        capability=(int(major), int(minor)),
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        free_bytes=free_bytes,
        shares_memory=shares_memory,
        # two transfers a clock, and a multiplication with an addition a clock (CUDA C++ Best Practices Guide,
        # "Theoretical Bandwidth Calculation"): 9751 MHz on 384 bits are the 936 GB/s of an RTX 3090's data sheet
        bandwidth_bytes_s=2e6 * memory_mhz * bus_bits / 8,
        flops=2e6 * core_mhz * cores,
    )


def _figure(ask: Callable[[], int]) -> int:
    """What the driver answers; 0 for a question that it or this GPU does not know."""
    import pynvml

    try:
        return int(ask())
    except pynvml.NVMLError:
        return 0


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _names(root: Path) -> list[str]:
    """Models of the GPUs that the kernel driver lists."""
    names = []
    for info in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        names.append(model[1].strip() if model else "NVIDIA GPU")
    return names
