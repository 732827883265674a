"""NVIDIA's management library for a described machine: a real shared library, found as the real one is."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from toolchain.base.gpu import Gpu

SOURCE = """\
#include <stdio.h>
#include <string.h>
struct gpu {{
    const char * name; const char * uuid; unsigned long long bytes, free; int major, minor, shares;
    unsigned bus_bits, memory_mhz, cores, core_mhz;
}};
static const struct gpu GPUS[] = {{ {gpus} }};
#define ONE(handle) GPUS[(unsigned long) (handle) - 1]
int nvmlInitWithFlags(unsigned flags) {{ (void) flags; return {init}; }}
int nvmlInit_v2(void) {{ return {init}; }}
int nvmlShutdown(void) {{ return 0; }}
const char * nvmlErrorString(int code) {{ (void) code; return "described"; }}
int nvmlSystemGetCudaDriverVersion_v2(int * version) {{ *version = {cuda}; return 0; }}
int nvmlSystemGetDriverVersion(char * text, unsigned size) {{ snprintf(text, size, "{driver}"); return 0; }}
int nvmlDeviceGetCount_v2(unsigned * count) {{ *count = {count}; return 0; }}
int nvmlDeviceGetHandleByIndex_v2(unsigned long i, void ** handle) {{ *handle = (void *) (i + 1); return 0; }}
int nvmlDeviceGetName(void * h, char * text, unsigned size) {{ snprintf(text, size, "%s", ONE(h).name); return 0; }}
int nvmlDeviceGetUUID(void * h, char * text, unsigned size) {{ snprintf(text, size, "%s", ONE(h).uuid); return 0; }}
int nvmlDeviceGetMemoryInfo(void * h, unsigned long long * m) {{
    if (ONE(h).shares) return 3; /* NVML_ERROR_NOT_SUPPORTED */
    m[0] = ONE(h).bytes; m[1] = ONE(h).free; m[2] = m[0] - m[1]; return 0;
}}
int nvmlDeviceGetMemoryBusWidth(void * h, unsigned * bits) {{ *bits = ONE(h).bus_bits; return *bits ? 0 : 3; }}
int nvmlDeviceGetNumGpuCores(void * h, unsigned * cores) {{ *cores = ONE(h).cores; return *cores ? 0 : 3; }}
int nvmlDeviceGetMaxClockInfo(void * h, int type, unsigned * mhz) {{
    *mhz = type == 2 ? ONE(h).memory_mhz : type == 1 ? ONE(h).core_mhz : 0; return *mhz ? 0 : 3;
}}
int nvmlDeviceGetCudaComputeCapability(void * h, int * major, int * minor) {{
    *major = ONE(h).major; *minor = ONE(h).minor; return 0;
}}
"""


def write_nvml(
    folder: Path,
    gpus: Sequence[Gpu],
    *,
    driver: str = "550.54.14",
    cuda: tuple[int, int] = (12, 4),
    answers: bool = True,
) -> dict[str, str]:
    """Compile it into ``folder``; the environment in which programs see these GPUs.

    Without ``answers`` it is there and fails, as after a driver update without a restart. Bandwidth and FLOPS are
    told as a bus of 256 bits and 1,000 cores at the clocks that give them; a GPU's free memory is what it says, or all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for gpu in gpus:
        major, minor = gpu.capability or (0, 0)
        free = gpu.free_bytes or gpu.memory_bytes
        clocks = f"{round(gpu.bandwidth_bytes_s / 64e6)}, {1000 if gpu.flops else 0}, {round(gpu.flops / 2e9)}"
        figures = f"{major}, {minor}, {int(gpu.shares_memory)}, {256 if gpu.bandwidth_bytes_s else 0}, {clocks}"
        rows.append(f'{{"{gpu.name}", "{gpu.uuid}", {gpu.memory_bytes}ULL, {free}ULL, {figures}}}')
    source = folder / "nvml.c"
    source.write_text(
        SOURCE.format(
            gpus=", ".join(rows) or "{0}",
            count=len(gpus),
            cuda=cuda[0] * 1000 + cuda[1] * 10,
            driver=driver,
            init=0 if answers else 18,
        )
    )
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}
