"""The header of a model that can do what is asked of it, checked before any library sees the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, NoReturn, TypeAlias

from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader, read_header

Purpose: TypeAlias = Literal["text", "embeddings"]
"""What the model is to make."""

_SPEECH_DECODER: Final = "wavtokenizer-dec"
# Architectures of llama.cpp that read text and write none (LLM_ARCH_* with an encoder graph only).
_ENCODERS: Final = frozenset(
    {"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3"}
    | {"eurobert", "t5encoder", "gemma-embedding", _SPEECH_DECODER}
)
_ENCODER_DECODERS: Final = frozenset({"t5"})
_DIFFUSION: Final = frozenset({"dream", "llada", "llada-moe", "rnd1"})
_OTHER_KINDS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "adapter": ("is a LoRA adapter, not a model", "name its base model, and this file behind --lora"),
        "vocab": (
            "holds a vocabulary and no weights",
            "name the model's own file; such a file only serves tests of tokenizers",
        ),
        "imatrix": ("is an importance matrix, not a model", "name the model that was made with it"),
        "mmproj": ("is the vision or audio part of a model", "name the language model's file, which it belongs to"),
        "other": ("is a GGUF, but not of a model", "name a causal language model"),
    }
)
_RANK_POOLING: Final = 4  # LLAMA_POOLING_TYPE_RANK: a reranker


def open_model(path: Path, purpose: Purpose = "text") -> GgufHeader:
    """The header of the model at ``path`` (of its first file, if it is split), fit for ``purpose``.

    Raises ArtifactError when any of its files lies in its header, UsageError when it is no such model.
    """
    header = read_header(path)
    if header.split is not None:
        headers = [read_header(shard) for shard in header.shard_paths]
        header = headers[0]
    if purpose == "text":
        require_generative(header)
    else:
        require_embedding(header)
    return header


def require_generative(header: GgufHeader) -> None:
    """Raise UsageError, saying what it is instead, unless ``header`` describes a model that writes text."""
    _require_model(header)
    if why := _no_generator(header):
        embeds = why.startswith("is an embedding model")
        instead = f"`python -m runtime embed {header.path}` makes vectors of text; to write, " if embeds else ""
        _refuse(header, why, f"{instead}name a causal language model")


def require_embedding(header: GgufHeader) -> None:
    """Raise UsageError unless ``header`` describes a model that makes vectors of text; one that writes does too."""
    _require_model(header)
    architecture = header.architecture
    if architecture in _ENCODER_DECODERS:
        _refuse(header, "is an encoder-decoder model, which this runtime does not drive", "name an embedding model")
    if header.arch_int("pooling_type") == _RANK_POOLING:
        _refuse(header, "is a reranker: it scores pairs of texts and makes no vectors", "name an embedding model")
    if architecture in _DIFFUSION or architecture == _SPEECH_DECODER:
        _refuse(header, "makes no vectors of text", "name an embedding model")


def _require_model(header: GgufHeader) -> None:
    name = header.path.name
    if header.kind != "model":
        what, hint = _OTHER_KINDS[header.kind]
        raise UsageError(f"{name} {what}", hint=hint)
    if header.text("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        raise UsageError(f"{name} has no tokenizer", hint="convert the original model with its tokenizer files")


def _refuse(header: GgufHeader, why: str, hint: str) -> NoReturn:
    raise UsageError(f"{header.path.name} {why}", evidence=f"architecture: {header.architecture}", hint=hint)


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
