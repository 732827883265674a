"""What a context takes of memory, by arithmetic on the header alone.

The cache is allocated and written in full when a context is made, so one that exceeds the machine's memory
ends in the kernel's killer and not in an error: it has to be refused before.
"""

from __future__ import annotations

from runtime.settings import Settings
from toolchain.base.console import format_bytes
from toolchain.base.errors import MemoryFitError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import GgufHeader
from toolchain.base.machine import Machine


def kv_bytes_per_token(header: GgufHeader, type_k: str, type_v: str) -> float:
    """Bytes of key and value cache for one token of context, over all layers (llama-kv-cache.cpp).

    0.0 where the header does not tell. Layers without attention count none where the header says so.
    """
    heads = header.arch_ints("attention.head_count") or ()
    kv_heads = header.arch_ints("attention.head_count_kv") or heads
    width = header.arch_int("embedding_length")
    if not heads or not max(heads) or not width:
        return 0.0
    key = header.arch_int("attention.key_length") or width // max(heads)
    value = header.arch_int("attention.value_length") or width // max(heads)
    layers = sum(kv_heads)
    if interval := header.arch_int("full_attention_interval"):  # every so many layers; the others are recurrent
        layers //= interval
    return layers * (key * _bytes_per_element(type_k) + value * _bytes_per_element(type_v))


def require_context_fits(header: GgufHeader, settings: Settings, machine: Machine) -> None:
    """Raise MemoryFitError when the cache alone exceeds this machine's memory; a GPU's is not judged here."""
    if machine.gpus and settings.number("n_gpu_layers") != 0:
        return
    per_token = kv_bytes_per_token(header, settings.text("type_k"), settings.text("type_v"))
    wanted = per_token * settings.number("n_ctx")
    if wanted > machine.ram_bytes:
        raise MemoryFitError(
            f"a context of {settings.number('n_ctx')} tokens does not fit in memory",
            evidence=f"its cache takes {format_bytes(wanted)}, this machine has {format_bytes(machine.ram_bytes)}",
            hint=f"--n-ctx {int(machine.ram_bytes / 2 / per_token)} would take half of it",
        )


def _bytes_per_element(kv_type: str) -> float:
    kind = GGML_TYPES_BY_NAME[kv_type.upper()]
    return kind.block_bytes / kind.block_size
