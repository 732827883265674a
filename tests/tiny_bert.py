"""A BERT of random weights with a word-piece vocabulary: an embedding model in a few KB."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away")
N_EMBD, N_FF, N_HEAD, N_LAYER, N_CTX = 64, 128, 4, 2, 128


def write_bert(path: Path, *, pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN) -> Path:
    """A model at ``path`` whose words are ``WORDS``; ``pooling`` is what its header names."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens = [*special, *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([*(gguf.TokenType.CONTROL,) * 4, *(gguf.TokenType.NORMAL,) * (len(tokens) - 4)])
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    for name, shape in _shapes(len(tokens)).items():
        writer.add_tensor(name, _values(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(sum(name.encode()))
    if "norm" in name:
        return np.ones(shape, np.float32) if name.endswith("weight") else np.zeros(shape, np.float32)
    return random.standard_normal(shape, np.float32) * 0.2


def _shapes(n_vocab: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, N_EMBD),
        "token_types.weight": (2, N_EMBD),
        "position_embd.weight": (N_CTX, N_EMBD),
    }
    norms = ["token_embd_norm"]
    for i in range(N_LAYER):
        norms += [f"blk.{i}.attn_output_norm", f"blk.{i}.layer_output_norm"]
        for part, rows, width in (
            *((f"attn_{x}", N_EMBD, N_EMBD) for x in ("q", "k", "v", "output")),
            ("ffn_up", N_FF, N_EMBD),
            ("ffn_down", N_EMBD, N_FF),
        ):
            shapes[f"blk.{i}.{part}.weight"] = (rows, width)
            shapes[f"blk.{i}.{part}.bias"] = (rows,)
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (N_EMBD,)
    return shapes
