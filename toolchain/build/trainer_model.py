"""Run as a program by ``legacy.prove_trainer``: write a Llama that is small, whole and always the same.

The trainers of 2023 read the architecture ``llama`` with a SentencePiece vocabulary, and their backward pass
knows no grouped queries: there are as many key and value heads as heads. Everything is F32, so that what an
adapter adds is not lost in rounding. GGUF shapes, width first as ggml counts them:

    token_embd, output              (N_EMBD, vocabulary)    blk.i.attn_{q,k,v,output}  (N_EMBD, N_EMBD)
    output_norm, blk.i.*_norm       (N_EMBD)                blk.i.ffn_{gate,up}        (N_EMBD, N_FF)
                                                            blk.i.ffn_down             (N_FF, N_EMBD)
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

N_EMBD, N_FF, N_HEAD, N_LAYER, N_CTX, EPS = 64, 96, 4, 2, 128, 1e-5
SEED = 2023
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
Array = npt.NDArray[np.float32]


def main(path: str) -> int:
    tokens, scores, kinds = vocabulary()
    write_model(Path(path), tokens, scores, kinds)
    return 0


def vocabulary() -> tuple[list[bytes], list[float], list[int]]:
    """Texts, scores and types: three special tokens, one for each byte, then space and small letters."""
    special = [(b"<unk>", 0.0, gguf.TokenType.UNKNOWN)]
    special += [(text, 0.0, gguf.TokenType.CONTROL) for text in (b"<s>", b"</s>")]
    each_byte = [(f"<0x{value:02X}>".encode(), 0.0, gguf.TokenType.BYTE) for value in range(256)]
    letters = [
        (character.encode(), -float(rank), gguf.TokenType.NORMAL)
        for rank, character in enumerate(SPACE + string.ascii_lowercase)
    ]
    texts, scores, kinds = zip(*special, *each_byte, *letters, strict=True)
    return list(texts), list(scores), [int(kind) for kind in kinds]


def weights(n_vocab: int) -> dict[str, Array]:
    """Seeded weights by name; a matrix is (rows, columns), its columns being the width that ggml names first."""
    random = np.random.default_rng(SEED)

    def matrix(rows: int, columns: int) -> Array:
        scaled: Array = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return scaled

    def ones() -> Array:
        return np.ones(N_EMBD, dtype=np.float32)

    found = {"token_embd.weight": matrix(n_vocab, N_EMBD)}
    for layer in range(N_LAYER):
        block = f"blk.{layer}."
        found |= {f"{block}{name}_norm.weight": ones() for name in ("attn", "ffn")}
        found |= {f"{block}attn_{name}.weight": matrix(N_EMBD, N_EMBD) for name in ("q", "k", "v", "output")}
        found |= {f"{block}ffn_{name}.weight": matrix(N_FF, N_EMBD) for name in ("gate", "up")}
        found[f"{block}ffn_down.weight"] = matrix(N_EMBD, N_FF)
    return found | {"output_norm.weight": ones(), "output.weight": matrix(n_vocab, N_EMBD)}


def write_model(path: Path, tokens: list[bytes], scores: list[float], kinds: list[int]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("trainer proof")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in weights(len(tokens)).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
