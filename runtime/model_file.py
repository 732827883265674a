"""The header of a model that can generate text, checked before any library sees the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader, read_header

# Architectures of llama.cpp that read text and write none (LLM_ARCH_* with an encoder graph only).
_ENCODERS: Final = frozenset(
    {"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3"}
    | {"eurobert", "t5encoder", "gemma-embedding", "wavtokenizer-dec"}
)
_ENCODER_DECODERS: Final = frozenset({"t5"})
_DIFFUSION: Final = frozenset({"dream", "llada", "llada-moe", "rnd1"})
_OTHER_KINDS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "adapter": ("is a LoRA adapter, not a model", "name the base model that it was trained on"),
        "vocab": ("holds a vocabulary and no weights", "name the model's own file"),
        "imatrix": ("is an importance matrix, not a model", "name the model that was made with it"),
        "mmproj": ("is the vision or audio part of a model", "name the language model's file"),
        "other": ("is a GGUF, but not of a model", "name a causal language model"),
    }
)
_RANK_POOLING: Final = 4  # LLAMA_POOLING_TYPE_RANK: a reranker


def open_model(path: Path) -> GgufHeader:
    """The header of the model at ``path`` (of its first file, if it is split), fit for generating text.

    Raises ArtifactError when any of its files lies in its header, UsageError when it is no generating model.
    """
    header = read_header(path)
    if header.split is not None:
        headers = [read_header(shard) for shard in header.shard_paths]
        header = headers[0]
    require_generative(header)
    return header


def require_generative(header: GgufHeader) -> None:
    """Raise UsageError, saying what it is instead, unless ``header`` describes a model that writes text."""
    name, architecture = header.path.name, header.architecture
    if header.kind != "model":
        what, hint = _OTHER_KINDS[header.kind]
        raise UsageError(f"{name} {what}", hint=hint)
    if why := _no_generator(header):
        raise UsageError(f"{name} {why}", evidence=f"architecture: {architecture}", hint="name a causal language model")
    if header.text("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        raise UsageError(f"{name} has no tokenizer", hint="convert the original model with its tokenizer files")


def _no_generator(header: GgufHeader) -> str:
    architecture = header.architecture
    if architecture in _ENCODER_DECODERS:
        return "is an encoder-decoder model, which this runtime does not drive"
    if architecture in _DIFFUSION:
        return "is a diffusion model: it does not write from left to right"
    pooling = header.arch_int("pooling_type")
    if pooling == _RANK_POOLING:
        return "is a reranker: it writes no text"
    if pooling or architecture in _ENCODERS or header.metadata.get(f"{architecture}.attention.causal") is False:
        return "is an embedding model: it writes no text"
    return ""
