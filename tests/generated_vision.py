"""Small vision parts (mmproj) of random weights, and pictures; each loads and sees in milliseconds.

* ``mlp``: a CLIP with LLaVA's two-layer projector. Every picture becomes ``N_TOKENS`` tokens.
* ``qwen2vl_merger``: Qwen2-VL's, for a model of M-RoPE (``write_qwen2vl``). A token is 28 pixels square.
* ``gemma3``: Gemma 3's; the language model looks at all tokens of a picture at once. As many as with ``mlp``.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import gguf
import numpy as np

from tests.generated_models import write_model

PATCH: Final = 7
SIDE: Final = 4
N_TOKENS: Final = SIDE**2
QWEN_PATCH: Final = 14

Kind: TypeAlias = Literal["mlp", "qwen2vl_merger", "gemma3"]


def write_mmproj(
    path: Path,
    n_embd_text: int,
    *,
    kind: Kind = "mlp",
    n_embd: int = 32,
    n_layer: int = 2,
    seed: int = 0,
) -> Path:
    """A vision part for a language model of width ``n_embd_text`` at ``path``."""
    numbers = np.random.default_rng(seed)
    patch = QWEN_PATCH if kind == "qwen2vl_merger" else PATCH
    patches = 2 * SIDE if kind == "gemma3" else SIDE  # to a side; four of Gemma's become a token
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", kind)
    writer.add_bool("clip.use_gelu", True)
    for name, value in (
        ("image_size", patches * patch),
        ("patch_size", patch),
        ("embedding_length", n_embd),
        ("feed_forward_length", 2 * n_embd),
        ("block_count", n_layer),
        ("projection_dim", n_embd_text),
        ("attention.head_count", 2),
        *((("projector.scale_factor", 2),) if kind == "gemma3" else ()),
    ):
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def matrix(name: str, *shape: int, scale: float = 0.2) -> None:
        writer.add_tensor(name, numbers.standard_normal(shape, np.float32) * scale)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(n_embd, np.float32))

    matrix("v.patch_embd.weight", n_embd, 3, patch, patch)
    match kind:
        case "mlp":
            matrix("v.class_embd", n_embd)
            matrix("v.position_embd.weight", patches**2 + 1, n_embd)
            norm("v.pre_ln")
        case "qwen2vl_merger":
            matrix("v.patch_embd.weight.1", n_embd, 3, patch, patch)  # of the second frame of a film
            norm("v.post_ln")
        case "gemma3":
            matrix("v.patch_embd.bias", n_embd)
            matrix("v.position_embd.weight", patches**2, n_embd)
            norm("v.post_ln")
            writer.add_tensor("mm.soft_emb_norm.weight", np.ones(n_embd, np.float32))
            matrix("mm.input_projection.weight", n_embd, n_embd_text, scale=1.0)
    for layer in range(n_layer):
        block = f"v.blk.{layer}."
        norm(f"{block}ln1")
        norm(f"{block}ln2")
        for part, rows, width in (
            *((f"attn_{each}", n_embd, n_embd) for each in ("q", "k", "v", "out")),
            ("ffn_up", 2 * n_embd, n_embd),
            ("ffn_down", n_embd, 2 * n_embd),
        ):
            matrix(f"{block}{part}.weight", rows, width)
            matrix(f"{block}{part}.bias", rows)
    if kind != "gemma3":
        merged = n_embd if kind == "mlp" else 4 * n_embd  # four patches become one token
        hidden = n_embd_text if kind == "mlp" else merged
        matrix("mm.0.weight", hidden, merged, scale=1.0)
        matrix("mm.0.bias", hidden)
        matrix("mm.2.weight", n_embd_text, hidden, scale=1.0)
        matrix("mm.2.bias", n_embd_text)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_text_model(path: Path, *, template: str = "", seed: int = 0) -> Path:
    """A Llama of width 64."""
    extents: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "head": 16, "n_ff": 96, "n_ctx_train": 512}
    return write_model(path, "llama", random=True, seed=seed, template=template, **extents)


def write_gemma3(path: Path) -> Path:
    """A Gemma 3 of width 64 with windows of 32 tokens."""
    extents: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "head": 16, "n_ff": 96, "n_ctx_train": 512, "window": 32}
    return write_model(path, "gemma3", random=True, **extents)


def write_qwen2vl(path: Path) -> Path:
    """A Qwen2-VL of width 64: a Qwen2 whose positions are of time, height and width."""
    plain = path.with_suffix(".plain")
    write_model(plain, "qwen2", random=True, n_layer=2, n_embd=64, head=16, n_ff=96, n_ctx_train=512)
    reader, writer = gguf.GGUFReader(plain), gguf.GGUFWriter(path, "qwen2vl")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name.replace("qwen2.", "qwen2vl."), field.contents(), kind, sub_type=sub)
    writer.add_rope_dimension_sections([2, 3, 3, 0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain.unlink()
    return path


def picture(name: str, *, kind: str = "PNG", width: int = 40, height: int = 40) -> bytes:
    """An image file of colours that ``name`` decides."""
    from PIL import Image

    numbers = np.random.default_rng(zlib.crc32(name.encode()))
    rgb: Any = numbers.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(rgb).resize((width, height), Image.Resampling.NEAREST).save(out, kind)
    return out.getvalue()
