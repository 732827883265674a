"""Headers of known models, built in memory from their published dimensions, in the mixes that llama-quantize makes.

Dimensions are those of the models' config.json on the hub: Llama 2 (meta-llama/Llama-2-7b-hf, -70b-hf), LLaMA 30B
(60 layers, 6656 wide; "LLaMA: Open and Efficient Foundation Language Models", table 2), Llama 3 (meta-llama/Meta-
Llama-3-8B, Llama-3.2-1B, Llama-3.1-70B), Qwen3 (Qwen/Qwen3-32B, Qwen3-30B-A3B), mistralai/Mixtral-8x7B-v0.1,
deepseek-ai/DeepSeek-V2-Lite and DeepSeek-V3, google/gemma-3-4b-it and -27b-it, LiquidAI/LFM2-1.2B, Phi-2's head of 80.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from toolchain.base.ggml_types import FILE_TYPES, GGML_TYPES_BY_NAME
from toolchain.base.gguf import GgufHeader, MetadataValue, TensorInfo

# The K-quant mixes of llama_tensor_get_type in src/llama-quant.cpp: (most tensors, attn_v and ffn_down here and there,
# output layer).
MIXES: Final[Mapping[str, tuple[str, str, str]]] = {
    "F16": ("F16", "F16", "F16"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "Q6_K": ("Q6_K", "Q6_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q3_K_M": ("Q3_K", "Q5_K", "Q6_K"),
    "Q2_K": ("Q2_K", "Q4_K", "Q6_K"),
}


def dense(
    mix: str,
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    architecture: str = "llama",
    head: int = 0,
    tied: bool = False,
    experts: tuple[int, int, int] | None = None,
    extra: Mapping[str, MetadataValue] | None = None,
) -> GgufHeader:
    """A decoder with gated feed-forward. ``experts``: (how many, how many are used, their inner width)."""
    head = head or width // heads
    metadata: dict[str, MetadataValue] = {
        "block_count": layers,
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "vocab_size": vocab,
    }
    if experts:
        metadata |= {"expert_count": experts[0], "expert_used_count": experts[1]}
        metadata |= {"expert_feed_forward_length": experts[2]}
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for i in range(layers):
        block = f"blk.{i}"
        shapes += [
            (f"{block}.attn_norm", (width,)),
            (f"{block}.attn_q", (width, heads * head)),
            (f"{block}.attn_k", (width, kv_heads * head)),
            (f"{block}.attn_v", (width, kv_heads * head)),
            (f"{block}.attn_output", (heads * head, width)),
            (f"{block}.ffn_norm", (width,)),
            *_feed_forward(block, width, inner, experts),
        ]
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            shapes += [(f"{block}.attn_q_norm", (head,)), (f"{block}.attn_k_norm", (head,))]
        if architecture == "gemma3":
            shapes += [(f"{block}.post_attention_norm", (width,)), (f"{block}.post_ffw_norm", (width,))]
    return _header(architecture, mix, {**metadata, **(extra or {})}, [*shapes, *_ends(width, vocab, tied)], layers)


def latent(
    mix: str,
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    vocab: int,
    experts: tuple[int, int, int],
    shared: int,
    leading: int,
    q_rank: int = 0,
) -> GgufHeader:
    """DeepSeek V2 and V3: keys and values in one latent of 512 and 64 elements (MLA), shared and many other experts.

    The first ``leading`` layers are dense; ``q_rank`` is the rank of the queries' latent, 0 for none.
    """
    latent_width, rope, nope, value = 512, 64, 128, 128
    keys = {"attention.kv_lora_rank": latent_width, "attention.key_length": latent_width + rope}
    if q_rank:
        keys["attention.q_lora_rank"] = q_rank
    metadata: dict[str, MetadataValue] = {
        **{"block_count": layers, "context_length": 163840, "embedding_length": width, "vocab_size": vocab},
        **{"attention.head_count": heads, "attention.head_count_kv": 1, "attention.value_length": latent_width},
        **{"attention.key_length_mla": nope + rope, "attention.value_length_mla": value, **keys},
        **{"expert_count": experts[0], "expert_used_count": experts[1], "expert_feed_forward_length": experts[2]},
        **{"leading_dense_block_count": leading, "expert_shared_count": shared, "feed_forward_length": inner},
        "rope.dimension_count": rope,
    }
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for i in range(layers):
        block = f"blk.{i}"
        shapes += [
            (f"{block}.attn_norm", (width,)),
            (f"{block}.attn_kv_a_mqa", (width, latent_width + rope)),
            (f"{block}.attn_kv_a_norm", (latent_width,)),
            (f"{block}.attn_k_b", (nope, latent_width, heads)),
            (f"{block}.attn_v_b", (latent_width, value, heads)),
            (f"{block}.attn_output", (heads * value, width)),
            (f"{block}.ffn_norm", (width,)),
            *_feed_forward(block, width, inner, experts if i >= leading else None),
        ]
        if q_rank:
            shapes += [(f"{block}.attn_q_a", (width, q_rank)), (f"{block}.attn_q_a_norm", (q_rank,))]
            shapes += [(f"{block}.attn_q_b", (q_rank, heads * (nope + rope)))]
        else:
            shapes += [(f"{block}.attn_q", (width, heads * (nope + rope)))]
        if i >= leading:
            shapes += [(f"{block}.ffn_{part}_shexp", (width, shared * experts[2])) for part in ("gate", "up")]
            shapes += [(f"{block}.ffn_down_shexp", (shared * experts[2], width))]
    return _header("deepseek2", mix, metadata, [*shapes, *_ends(width, vocab, False)], layers)


def hybrid(mix: str) -> GgufHeader:
    """LFM2 1.2B: 6 layers with attention among 10 of short convolutions."""
    layers, width, inner, heads, kv_heads, head, vocab = 16, 2048, 8192, 32, 8, 64, 65536
    attention = {2, 5, 8, 10, 12, 14}
    shapes: list[tuple[str, tuple[int, ...]]] = [("token_embd_norm", (width,)), ("token_embd", (width, vocab))]
    for i in range(layers):
        block = f"blk.{i}"
        shapes += [(f"{block}.attn_norm", (width,)), (f"{block}.ffn_norm", (width,))]
        shapes += _feed_forward(block, width, inner, None)
        if i in attention:
            shapes += [(f"{block}.attn_{part}_norm", (head,)) for part in "qk"]
            shapes += [(f"{block}.attn_{part}", (width, kv_heads * head)) for part in "kv"]
            shapes += [(f"{block}.attn_q", (width, width)), (f"{block}.attn_output", (width, width))]
        else:
            shapes += [(f"{block}.shortconv.conv", (3, width)), (f"{block}.shortconv.in_proj", (width, 3 * width))]
            shapes += [(f"{block}.shortconv.out_proj", (width, width))]
    per_layer = memoryview(bytes(kv_heads if i in attention else 0 for i in range(layers)))
    metadata: dict[str, MetadataValue] = {
        **{"block_count": layers, "context_length": 128000, "embedding_length": width, "feed_forward_length": inner},
        **{"attention.head_count": heads, "attention.head_count_kv": per_layer, "shortconv.l_cache": 3},
        "vocab_size": vocab,
    }
    return _header("lfm2", mix, metadata, shapes, layers)


@lru_cache
def known(name: str, mix: str = "Q4_K_M") -> GgufHeader:  # noqa: PLR0911, PLR0912
    """A model by its short name."""
    llama3 = {"vocab": 128256, "context": 131072, "kv_heads": 8}
    qwen3 = {"vocab": 151936, "context": 40960, "head": 128}
    gemma3: dict[str, MetadataValue] = {"attention.sliding_window": 1024}
    match name:
        case "llama-1b":
            return dense(mix, layers=16, width=2048, inner=8192, heads=32, tied=True, **llama3)
        case "llama-3b":
            return dense(mix, layers=28, width=3072, inner=8192, heads=24, tied=True, **llama3)
        case "llama-8b":
            return dense(mix, layers=32, width=4096, inner=14336, heads=32, **llama3)
        case "llama-70b":
            return dense(mix, layers=80, width=8192, inner=28672, heads=64, **llama3)
        case "llama2-7b":
            return dense(mix, layers=32, width=4096, inner=11008, heads=32, kv_heads=32, vocab=32000, context=4096)
        case "llama2-13b":
            return dense(mix, layers=40, width=5120, inner=13824, heads=40, kv_heads=40, vocab=32000, context=4096)
        case "llama-30b":
            return dense(mix, layers=60, width=6656, inner=17920, heads=52, kv_heads=52, vocab=32000, context=2048)
        case "qwen3-32b":
            return dense(mix, architecture="qwen3", layers=64, width=5120, inner=25600, heads=64, kv_heads=8, **qwen3)
        case "qwen3-30b-a3b":
            moe = {"architecture": "qwen3moe", "experts": (128, 8, 768)}
            return dense(mix, layers=48, width=2048, inner=6144, heads=32, kv_heads=4, **moe, **qwen3)  # type: ignore[arg-type]
        case "mixtral-8x7b":
            return dense(
                mix,
                **{"layers": 32, "width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocab": 32000},
                context=32768,
                experts=(8, 2, 14336),
            )
        case "deepseek-v2-lite":
            few = {"layers": 27, "width": 2048, "inner": 10944, "heads": 16, "vocab": 102400}
            return latent(mix, experts=(64, 6, 1408), shared=2, leading=1, **few)
        case "deepseek-v3":
            many = {"layers": 61, "width": 7168, "inner": 18432, "heads": 128, "vocab": 129280}
            return latent(mix, experts=(256, 8, 2048), shared=1, leading=3, q_rank=1536, **many)
        case "gemma3-4b":
            dims = {"layers": 34, "width": 2560, "inner": 10240, "heads": 8, "kv_heads": 4, "head": 256}
            return dense(mix, architecture="gemma3", vocab=262208, context=131072, tied=True, extra=gemma3, **dims)
        case "gemma3-27b":
            dims = {"layers": 62, "width": 5376, "inner": 21504, "heads": 32, "kv_heads": 16, "head": 128}
            return dense(mix, architecture="gemma3", vocab=262208, context=131072, tied=True, extra=gemma3, **dims)
        case "head-80":
            return dense(mix, layers=32, width=2560, inner=10240, heads=32, kv_heads=32, vocab=51200, context=32768)
        case "lfm2-1.2b":
            return hybrid(mix)
    raise ValueError(f"no described model {name}")


def _feed_forward(
    block: str, width: int, inner: int, experts: tuple[int, int, int] | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if experts is None:
        yield from ((f"{block}.ffn_{part}", (width, inner)) for part in ("gate", "up"))
        yield f"{block}.ffn_down", (inner, width)
    else:
        count, _, each = experts
        yield f"{block}.ffn_gate_inp", (width, count)
        yield from ((f"{block}.ffn_{part}_exps", (width, each, count)) for part in ("gate", "up"))
        yield f"{block}.ffn_down_exps", (each, width, count)


def _ends(width: int, vocab: int, tied: bool) -> list[tuple[str, tuple[int, ...]]]:
    ends: list[tuple[str, tuple[int, ...]]] = [("token_embd", (width, vocab)), ("output_norm", (width,))]
    return ends if tied else [*ends, ("output", (width, vocab))]


def _header(
    architecture: str,
    mix: str,
    metadata: Mapping[str, MetadataValue],
    shapes: list[tuple[str, tuple[int, ...]]],
    layers: int,
) -> GgufHeader:
    tensors, offset = [], 0
    for name, shape in shapes:
        kind = GGML_TYPES_BY_NAME[_type(name, shape, mix, layers)]
        count = 1
        for extent in shape:
            count *= extent
        nbytes = kind.nbytes(count)
        tensors.append(TensorInfo(name=f"{name}.weight", shape=shape, type=kind.name, offset=offset, nbytes=nbytes))
        offset += -(-nbytes // 32) * 32
    file_type = next(number for number, known in FILE_TYPES.items() if known == mix)
    return GgufHeader(
        path=Path(f"{architecture}-{mix}.gguf"),
        version=3,
        byte_order="little",
        metadata={
            "general.architecture": architecture,
            "general.file_type": file_type,
            **{f"{architecture}.{name}": value for name, value in metadata.items()},
        },
        tensors=tuple(tensors),
        alignment=32,
        data_offset=0,
        file_bytes=offset,
    )


def _type(name: str, shape: tuple[int, ...], mix: str, layers: int) -> str:
    """The type that the mix gives a tensor; small ones and the experts' router stay as they are."""
    most, more, output = MIXES[mix]
    if len(shape) == 1 or "norm" in name or "ffn_gate_inp" in name or "shortconv.conv" in name:
        return "F32"
    if name == "output":
        return output
    fallback = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    wanted = most
    if name.startswith("blk.") and ("attn_v." in f"{name}." or "ffn_down" in name):
        i = int(name.split(".")[1])
        if i < layers / 8 or i >= 7 * layers / 8 or (i - layers // 8) % 3 == 2:  # use_more_bits
            wanted = more
    return fallback.get(wanted, wanted) if shape[0] % GGML_TYPES_BY_NAME[wanted].block_size else wanted
