"""Run as a program by ``bindings.prove``: load llama_cpp, say what it is, and check a decode by hand.

The check is a known answer: a one-layer Llama of random weights decodes one token, and numpy computes the
same logits from the same weights. With one token, attention passes its value through unchanged, so the whole
forward pass is a few lines. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

N_EMBD, N_FF, N_HEAD, N_VOCAB, EPS = 64, 128, 4, 32, 1e-5
Array = npt.NDArray[np.float32]
Weights = dict[str, Array]


def main() -> int:
    import llama_cpp
    from llama_cpp import llama_cpp as api

    with tempfile.TemporaryDirectory() as scratch:
        weights = random_weights()
        model = Path(scratch) / "proof.gguf"
        write_model(model, weights)
        for token in (3, 17):
            found = decoded_logits(api, model, token)
            wanted = reference_logits(weights, token)
            difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            # f32 weights; accelerators may multiply in tf32 or f16, which keeps about three digits
            if not np.isfinite(found).all() or difference > 2e-2:
                sys.stderr.write(f"a decode of token {token} is off by {difference:.2%} of the largest logit\n")
                return 6
    ggml = loaded_library("libggml-base")
    commit = ctypes.CDLL(ggml).ggml_commit
    commit.restype = ctypes.c_char_p
    answer = {
        "version": llama_cpp.__version__,
        "commit": commit().decode(),
        "backends": backends(),
        "library": loaded_library("libllama."),
    }
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return 0


def random_weights() -> Weights:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Array:
        scaled: Array = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return scaled

    return {
        "token_embd.weight": matrix(N_VOCAB, N_EMBD),
        "output_norm.weight": 1 + matrix(1, N_EMBD)[0],
        "output.weight": matrix(N_VOCAB, N_EMBD),
        "blk.0.attn_norm.weight": 1 + matrix(1, N_EMBD)[0],
        "blk.0.attn_q.weight": matrix(N_EMBD, N_EMBD),
        "blk.0.attn_k.weight": matrix(N_EMBD, N_EMBD),
        "blk.0.attn_v.weight": matrix(N_EMBD, N_EMBD),
        "blk.0.attn_output.weight": matrix(N_EMBD, N_EMBD),
        "blk.0.ffn_norm.weight": 1 + matrix(1, N_EMBD)[0],
        "blk.0.ffn_gate.weight": matrix(N_FF, N_EMBD),
        "blk.0.ffn_up.weight": matrix(N_FF, N_EMBD),
        "blk.0.ffn_down.weight": matrix(N_EMBD, N_FF),
    }


def write_model(path: Path, weights: Weights) -> None:
    """A GGUF of the weights, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(1)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_logits(weights: Weights, token: int) -> Array:
    """(N_VOCAB,) logits after the single token ``token``."""

    def norm(x: Array, name: str) -> Array:
        scaled: Array = x / np.sqrt(np.mean(x * x) + EPS) * weights[name]
        return scaled

    x = weights["token_embd.weight"][token]
    value = weights["blk.0.attn_v.weight"] @ norm(x, "blk.0.attn_norm.weight")
    x = x + weights["blk.0.attn_output.weight"] @ value
    inner = norm(x, "blk.0.ffn_norm.weight")
    gate = weights["blk.0.ffn_gate.weight"] @ inner
    x = x + weights["blk.0.ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (weights["blk.0.ffn_up.weight"] @ inner))
    logits: Array = weights["output.weight"] @ norm(x, "output_norm.weight")
    return logits


def decoded_logits(api: object, path: Path, token: int) -> Array:
    """(N_VOCAB,) logits as the library computes them, with every layer on the GPU where there is one."""
    a = vars(api)
    a["llama_backend_init"]()
    model_params = a["llama_model_default_params"]()
    model_params.n_gpu_layers = 99
    model = a["llama_model_load_from_file"](str(path).encode(), model_params)
    if not model:
        raise SystemExit("the library does not load a plain Llama GGUF")
    context_params = a["llama_context_default_params"]()
    context_params.n_ctx = 64
    context_params.n_threads = context_params.n_threads_batch = 1
    context = a["llama_init_from_model"](model, context_params)
    if not context:
        raise SystemExit("the library makes no context")
    tokens = (a["llama_token"] * 1)(token)
    if status := a["llama_decode"](context, a["llama_batch_get_one"](tokens, 1)):
        raise SystemExit(f"llama_decode returned {status}")
    logits = np.ctypeslib.as_array(a["llama_get_logits_ith"](context, -1), shape=(N_VOCAB,)).copy()
    a["llama_free"](context)
    a["llama_model_free"](model)
    return logits


def backends() -> list[str]:
    """Names of the backends that ggml registered, as the library spells them."""
    ggml = ctypes.CDLL(loaded_library("libggml."))
    base = ctypes.CDLL(loaded_library("libggml-base"))
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    ggml.ggml_backend_reg_get.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    base.ggml_backend_reg_name.restype = ctypes.c_char_p
    base.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    return [
        base.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i)).decode() for i in range(ggml.ggml_backend_reg_count())
    ]


def loaded_library(name: str) -> str:
    """The file of a library that this process has mapped, by the beginning of its name."""
    import psutil

    for mapping in psutil.Process().memory_maps():
        if Path(mapping.path).name.startswith(name):
            return str(mapping.path)
    raise SystemExit(f"{name} is not loaded")


if __name__ == "__main__":
    sys.exit(main())
