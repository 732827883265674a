"""The library's own answer to what ``footprint`` computes, to the byte, without a byte of weights read.

A model loaded with ``no_alloc`` allocates neither weights nor cache nor compute buffers, but sizes them all (the way of
common/fit.cpp in llama.cpp 0c1e570). The sizes are those of ``llama_get_memory_breakdown``, which is C++ and gives a
std::map: it is walked here as libstdc++ lays it out, and every entry is checked. (The log's "model buffer size" lines
say 0.00 MiB in this mode.) It needs only the header of the file, and a hole where its data would be.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from runtime.engine.placement import keep_experts
from runtime.library import import_library, route_log
from runtime.library_log import LibraryLog
from runtime.memory.footprint import BufferBytes, Demand, Placement
from toolchain.base.errors import ArtifactError, MissingError, UsageError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME

_BREAKDOWN: Final = "_Z26llama_get_memory_breakdownPK13llama_context"
_FLASH_OFF, _FLASH_ON = 0, 1  # enum llama_flash_attn_type in llama.h
_LOAD_MODE_NONE: Final = 0  # enum llama_load_mode
_MOST_BUFFER_TYPES: Final = 64


def can_ask() -> bool:
    """Whether this library tells its breakdown in a form that we read."""
    if platform.machine() not in ("x86_64", "AMD64"):  # elsewhere a map's address is not the first argument
        return False
    lib = import_library()
    return hasattr(ctypes.CDLL(lib._lib._name), _BREAKDOWN)


def ask(path: Path, demand: Demand, placement: Placement, *, allocate: bool = False) -> tuple[BufferBytes, ...]:
    """Bytes on the host, then on each GPU that the library sees, for the model at ``path``.

    ``allocate`` loads it for real, weights and all. Where attention without flash attention is kept from the GPU
    (offload_kqv off) the answer without it is of another schedule than a real load's: the sizing pass forgets which
    backend the graph asks for (ggml_backend_sched_reserve_size resets the scheduler first).

    ``experts`` and ``output`` are parts that the library does not tell: 0. Raises MissingError where the library has no
    such answer, ArtifactError when it refuses the file, UsageError when it refuses the demand.
    """
    lib = import_library()
    if not can_ask():
        raise MissingError("this library does not tell its memory", hint="run `./inv build`")
    previous, data = ctypes.c_void_p(), ctypes.c_void_p()
    raw = ctypes.CDLL(lib._lib._name)
    raw.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    log = route_log(lib, verbose=False)
    try:
        lib.llama_backend_init()
        return _ask(lib, raw, path, demand, placement, log, allocate)
    finally:
        raw.llama_log_set(previous, data)


def _ask(
    lib: Any, raw: Any, path: Path, demand: Demand, placement: Placement, log: LibraryLog, allocate: bool
) -> tuple[BufferBytes, ...]:
    params = lib.llama_model_default_params()
    params.no_alloc, params.load_mode = not allocate, _LOAD_MODE_NONE
    params.n_gpu_layers = placement.n_gpu_layers
    split = (ctypes.c_float * max(1, lib.llama_max_devices()))(*placement.tensor_split)
    params.tensor_split = ctypes.cast(split, type(params.tensor_split))
    layers = placement.cpu_expert_layers
    kept = keep_experts(lib, params, range(layers) if isinstance(layers, int) else layers)
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ArtifactError(f"the library refuses {path.name}", evidence=log.tail())
    try:
        context = lib.llama_init_from_model(model, _context_params(lib, demand, placement))
        if not context:
            raise UsageError("the library refuses these settings", evidence=log.tail())
        try:
            rows = max(demand.n_seq_max, demand.n_outputs_max or min(lib.llama_n_batch(context), demand.n_batch))
            n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
            return _by_device(raw, model, context, 4 * n_vocab * rows)
        finally:
            lib.llama_free(context)
    finally:
        lib.llama_model_free(model)
        del kept


def _context_params(lib: Any, demand: Demand, placement: Placement) -> Any:
    params = lib.llama_context_default_params()
    for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_outputs_max", "kv_unified", "swa_full"):
        setattr(params, name, getattr(demand, name))
    params.type_k = GGML_TYPES_BY_NAME[demand.type_k.upper()].id
    params.type_v = GGML_TYPES_BY_NAME[demand.type_v.upper()].id
    params.flash_attn_type = _FLASH_ON if demand.flash_attn else _FLASH_OFF
    params.offload_kqv = placement.offload_kqv
    return params


def _by_device(raw: Any, model: Any, context: Any, results: int) -> tuple[BufferBytes, ...]:
    raw.ggml_backend_buft_get_device.restype = ctypes.c_void_p
    raw.ggml_backend_buft_get_device.argtypes = raw.ggml_backend_buft_is_host.argtypes = [ctypes.c_void_p]
    raw.ggml_backend_buft_is_host.restype = ctypes.c_bool
    devices = _devices(raw, model)
    sums = [[0, 0, 0] for _ in range(len(devices) + 1)]
    for buffer_type, sizes in _breakdown(raw, context):
        device = raw.ggml_backend_buft_get_device(buffer_type)
        host = raw.ggml_backend_buft_is_host(buffer_type) or device not in devices
        for column, size in enumerate(sizes):
            sums[0 if host else 1 + devices.index(device)][column] += size
    return tuple(
        BufferBytes(weights=w, experts=0, kv=kv, compute=c, output=0, results=0 if i else results)
        for i, (w, kv, c) in enumerate(sums)
    )


def _devices(raw: Any, model: Any) -> list[int]:
    count, get = raw._Z21llama_model_n_devicesPK11llama_model, raw._Z22llama_model_get_devicePK11llama_modeli
    count.argtypes, get.argtypes, get.restype = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int], ctypes.c_void_p
    return [get(model, index) for index in range(count(model))]


def _breakdown(raw: Any, context: Any) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """(buffer type, (model, context, compute)) of each entry of the map.

    An _Rb_tree of libstdc++ is {comparer, header {color, parent, leftmost, rightmost}, count}, a node {color, parent,
    left, right, value}, each field a word. Its few nodes are not freed: the destructor is C++ too.
    """
    tree = (ctypes.c_size_t * 6)()
    function = getattr(raw, _BREAKDOWN)
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    function(ctypes.addressof(tree), context)  # the result's address goes first in the calling conventions we know
    root, count = tree[2], tree[5]
    if not 0 < count <= _MOST_BUFFER_TYPES or not root:
        raise MissingError("this library's breakdown of memory is laid out in another way", hint="use footprint()")
    pending, found = [root], 0
    while pending:
        words = (ctypes.c_size_t * 8).from_address(pending.pop())
        pending.extend(address for address in (words[2], words[3]) if address)
        found += 1
        if found > count:
            raise MissingError("this library's breakdown of memory is laid out in another way")
        yield words[4], (words[5], words[6], words[7])
