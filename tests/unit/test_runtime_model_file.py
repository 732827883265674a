from __future__ import annotations

from pathlib import Path

import pytest

from runtime.model_file import require_generative
from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader, MetadataValue, TensorInfo

WEIGHT = TensorInfo(name="output.weight", shape=(256, 8), type="F32", offset=0, nbytes=8192)


def header(tensors: tuple[TensorInfo, ...] = (WEIGHT,), **metadata: MetadataValue) -> GgufHeader:
    known: dict[str, MetadataValue] = {"general.architecture": "llama", "tokenizer.ggml.model": "llama"}
    known.update({name.replace("__", "."): value for name, value in metadata.items()})
    return GgufHeader(
        path=Path("some.gguf"),
        version=3,
        byte_order="little",
        metadata=known,
        tensors=tensors,
        alignment=32,
        data_offset=0,
        file_bytes=8192,
    )


def test_causal_model_is_accepted() -> None:
    require_generative(header())


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (header(general__type="adapter"), "LoRA adapter"),
        (header(general__type="imatrix"), "importance matrix"),
        (header(general__type="mmproj"), "vision or audio"),
        (header(general__type="dataset"), "not of a model"),
        (header(tensors=()), "no weights"),
        (header(general__architecture="bert"), "embedding model"),
        (header(llama__attention__causal=False), "embedding model"),
        (header(llama__pooling_type=3), "embedding model"),
        (header(llama__pooling_type=4), "reranker"),
        (header(general__architecture="t5"), "encoder-decoder"),
        (header(general__architecture="dream"), "diffusion"),
        (header(tokenizer__ggml__model="no_vocab"), "no tokenizer"),
    ],
)
def test_what_writes_no_text_is_refused_by_its_header(refused: GgufHeader, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        require_generative(refused)
