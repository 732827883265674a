"""The GPUs as the library itself counts them, for those that NVML does not describe: Vulkan's, HIP's, MIG slices.

It loads the library, which starts the drivers: some 0.1 to 1 s. Values of enums are those of ggml-backend.h
(llama.cpp 0c1e570).
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from runtime.library import import_library, route_log
from runtime.memory.devices import LibraryGpu
from toolchain.base.errors import MissingError

_GPU: Final = 1  # enum ggml_backend_dev_type
_INTEGRATED: Final = 2
_MOST_DEVICES: Final = 64


def library_gpus() -> tuple[LibraryGpu, ...]:
    """In the order in which the library gives them layers; integrated ones only where there are no others.

    Raises MissingError without a usable library.
    """
    lib = import_library()
    raw = ctypes.CDLL(lib._lib._name)
    previous, data = ctypes.c_void_p(), ctypes.c_void_p()
    raw.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    route_log(lib, verbose=False)
    try:
        lib.llama_backend_init()
        lib.llama_supports_gpu_offload()  # loads backends that are files of their own
        found = _devices(raw)
    except AttributeError as error:
        raise MissingError("this library does not tell its devices", evidence=str(error)) from error
    finally:
        raw.llama_log_set(previous, data)
    own = tuple(gpu for gpu in found if not gpu.integrated)
    return own or found


def _devices(raw: Any) -> tuple[LibraryGpu, ...]:
    raw.ggml_backend_dev_count.restype = ctypes.c_size_t
    raw.ggml_backend_dev_get.restype, raw.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    raw.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    raw.ggml_backend_dev_description.restype = ctypes.c_char_p
    raw.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    sizes = ctypes.POINTER(ctypes.c_size_t)
    raw.ggml_backend_dev_memory.restype, raw.ggml_backend_dev_memory.argtypes = None, [ctypes.c_void_p, sizes, sizes]
    found = []
    for number in range(min(_MOST_DEVICES, raw.ggml_backend_dev_count())):
        device = raw.ggml_backend_dev_get(number)
        kind = raw.ggml_backend_dev_type(device)
        if kind in (_GPU, _INTEGRATED):
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            raw.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            name = (raw.ggml_backend_dev_description(device) or b"GPU").decode("utf-8", "replace").strip()
            found.append(
                LibraryGpu(name=name, total_bytes=total.value, free_bytes=free.value, integrated=kind == _INTEGRATED)
            )
    return tuple(found)
