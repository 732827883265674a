from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.memory.context_guard import kv_bytes_per_token, require_context_fits
from runtime.settings import settle
from tests.described import machine
from toolchain.base.errors import MemoryFitError
from toolchain.base.gguf import GgufHeader, MetadataValue

HERE = machine(cpus=2, cores=2, ram_bytes=2**30, available_bytes=2**29)


def header(**metadata: MetadataValue) -> GgufHeader:
    """Llama 3 8B's shape unless said otherwise."""
    known: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "llama.block_count": 32,
        "llama.embedding_length": 4096,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
    }
    known.update({f"llama.{name.replace('__', '.')}": value for name, value in metadata.items()})
    return GgufHeader(
        path=Path("some.gguf"),
        version=3,
        byte_order="little",
        metadata=known,
        tensors=(),
        alignment=32,
        data_offset=0,
        file_bytes=0,
    )


def test_cache_of_a_known_model() -> None:
    assert kv_bytes_per_token(header(), "f16", "f16") == 128 * 1024
    assert kv_bytes_per_token(header(), "q8_0", "q8_0") == 68 * 1024


def test_layers_without_attention_count_none() -> None:
    kv_heads = memoryview(bytes([8, 0] * 16))
    assert kv_bytes_per_token(header(attention__head_count_kv=kv_heads), "f16", "f16") == 64 * 1024
    assert kv_bytes_per_token(header(full_attention_interval=4), "f16", "f16") == 32 * 1024


def test_model_without_attention_needs_no_cache() -> None:
    assert kv_bytes_per_token(header(attention__head_count=0), "f16", "f16") == 0


def test_context_beyond_memory_is_refused_with_one_that_fits() -> None:
    settings = settle(machine=HERE, n_ctx_train=131072, flags={"n_ctx": 16384})
    with pytest.raises(MemoryFitError) as caught:
        require_context_fits(header(), settings, HERE)
    assert "2.00 GiB" in caught.value.evidence
    assert "--n-ctx 4096" in caught.value.hint
    require_context_fits(header(), settings, replace(HERE, ram_bytes=2**32))
