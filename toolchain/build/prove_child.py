"""Run as a program by ``proof.prove``: load llama_cpp, say what it is, and check a decode by hand.

The check is a known answer: a one-layer Llama of random weights decodes one token, and numpy computes the
same logits from the same weights. With one token, attention passes its value through unchanged, so the whole
forward pass is a few lines. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import ctypes
import json
import re
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

    told = listen(api)
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
    log = "".join(told)
    offloaded = re.findall(r"offloaded (\d+)/(\d+) layers to GPU", log)
    answer = {
        "version": llama_cpp.__version__,
        "commit": commit(),
        "backends": backends(),
        "library": loaded_library("libllama."),
        "devices": sorted(set(re.findall(r"using device (\S+)", log))),
        "layers": [int(count) for count in offloaded[-1]] if offloaded else [0, 0],
        "told": [line for line in log.splitlines() if re.search(r"error|fail|CUDA|driver|device", line, re.I)][:12],
    }
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return 0


def listen(api: object) -> list[str]:
    """The lines that the library logs from now on; in a tree without a log callback, none."""
    lines: list[str] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, data: lines.append(text.decode(errors="replace"))
    )
    listening.append(callback)
    for name in ("libllama.", "libggml-base."):
        if path := loaded_library(name):
            setter = getattr(ctypes.CDLL(path), "llama_log_set" if "llama" in name else "ggml_log_set", None)
            if setter:
                setter(callback, None)
    return lines


listening: list[object] = []  # a callback lives as long as the library may call it


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
    """(N_VOCAB,) logits as the library computes them, with every layer on the GPU where there is one.

    The older names of functions are those of 2023 and 2024 (llama.h's DEPRECATED marks).
    """
    a = vars(api)
    a["llama_backend_init"]()
    model_params = a["llama_model_default_params"]()
    model_params.n_gpu_layers = 99
    load = a.get("llama_model_load_from_file") or a["llama_load_model_from_file"]
    model = load(str(path).encode(), model_params)
    if not model:
        raise SystemExit("the library does not load a plain Llama GGUF")
    context_params = a["llama_context_default_params"]()
    context_params.n_ctx = 64
    context_params.n_threads = context_params.n_threads_batch = 1
    context = (a.get("llama_init_from_model") or a["llama_new_context_with_model"])(model, context_params)
    if not context:
        raise SystemExit("the library makes no context")
    tokens = (a["llama_token"] * 1)(token)
    one = a["llama_batch_get_one"]
    batch = one(tokens, 1) if len(one.argtypes) == 2 else one(tokens, 1, 0, 0)
    if status := a["llama_decode"](context, batch):
        raise SystemExit(f"llama_decode returned {status}")
    logits = np.ctypeslib.as_array(a["llama_get_logits_ith"](context, 0), shape=(N_VOCAB,)).copy()
    a["llama_free"](context)
    (a.get("llama_model_free") or a["llama_free_model"])(model)
    return logits


def commit() -> str:
    """The commit that the library was built from; empty for one of before ggml told it (2025)."""
    teller = getattr(ctypes.CDLL(loaded_library("libggml-base.") or loaded_library("libllama.")), "ggml_commit", None)
    if teller is None:
        return ""
    teller.restype = ctypes.c_char_p
    return str(teller().decode())


def backends() -> list[str]:
    """Names of the backends that ggml registered, as the library spells them."""
    if not loaded_library("libggml-base."):
        old = ctypes.CDLL(loaded_library("libllama."))
        cuda = [getattr(old, name) for name in ("ggml_cpu_has_cuda", "ggml_cpu_has_cublas") if hasattr(old, name)]
        return ["CUDA", "CPU"] if any(has() for has in cuda) else ["CPU"]
    ggml = ctypes.CDLL(loaded_library("libggml."))
    base = ctypes.CDLL(loaded_library("libggml-base."))
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    ggml.ggml_backend_reg_get.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    base.ggml_backend_reg_name.restype = ctypes.c_char_p
    base.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    return [
        base.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i)).decode() for i in range(ggml.ggml_backend_reg_count())
    ]


def loaded_library(name: str) -> str:
    """The file of a library that this process has mapped, by the beginning of its name; empty without one."""
    return next((path for path in mapped_files() if Path(path).name.startswith(name)), "")


def mapped_files() -> list[str]:
    """Libraries of this process: from the kernel on Linux, from the loader on macOS."""
    if sys.platform == "darwin":
        loader = ctypes.CDLL(None)
        loader._dyld_get_image_name.restype = ctypes.c_char_p
        return [loader._dyld_get_image_name(i).decode() for i in range(loader._dyld_image_count())]
    fields = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return [field[5] for field in fields if len(field) == 6]


if __name__ == "__main__":
    sys.exit(main())
