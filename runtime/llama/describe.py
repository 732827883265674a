"""What a loaded model takes of the machine, and what its header says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.memory.plan import MemoryPlan
    from runtime.settings import Settings
    from toolchain.base.gguf import GgufHeader


@dataclass(frozen=True, kw_only=True)
class LoadResourceInfo:
    """Bytes that the model takes, as planned for the settings it was loaded with.

    - ``vram_bytes``, ``ram_bytes``: on all GPUs together, and on the host: weights, cache, compute buffers, adapters.
      A memory that both share counts as the GPU's.
    - ``devices``: tuple of dicts, the host first, with ``name kind total_bytes free_bytes weights_bytes experts_bytes
      kv_bytes compute_bytes output_bytes mmproj_bytes adapters_bytes margin_bytes left_bytes`` (``experts`` are part
      of the weights, ``output`` of compute).
    - ``per_layer_bytes``: tuple of int, weights and cache of each layer, the first one first.
    - ``output_layer_bytes``: of the output layer, which moves to a GPU as one more layer.
    - ``input_bytes``: of the input embedding, which stays on the host.
    - ``layers``: layers of the model; ``gpu_layers``: how many of them and the output layer are on GPUs.
    - ``expected_max_bytes``: what a GPU takes that holds every layer, the output layer and the compute buffers.
    - ``exact``: whether the sizes are the library's own answer; else they are computed as the library allocates.
    - ``settings``: tuple of ``{name, value, origin, reason}``, llama.cpp's names.
    """

    vram_bytes: int
    ram_bytes: int
    devices: tuple[dict[str, Any], ...]
    per_layer_bytes: tuple[int, ...]
    output_layer_bytes: int
    input_bytes: int
    layers: int
    gpu_layers: int
    expected_max_bytes: int
    exact: bool
    settings: tuple[dict[str, int | str], ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as a dictionary of its names."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ModelMetaInfo:
    """What the file's header says; None where it says nothing.

    - ``path``: str, its first file; ``name``: the name inside it.
    - ``architecture``: such as ``"llama"``; ``quantization``: such as ``"Q4_K_M"``.
    - ``parameters``: weights, all files together; ``bytes``: of these weights; ``bits_per_weight``: float.
    - ``layers``, ``embedding_length``, ``heads``, ``kv_heads`` (of the layer that has most), ``experts``,
      ``experts_used``: int.
    - ``n_ctx_train``: tokens of context it was trained with.
    - ``vocabulary``: tokens; ``tokenizer``: such as ``"llama"`` (SentencePiece) or ``"gpt2"`` (BPE).
    - ``rope_freq_base``: float; ``rope_scaling``: ``"none"``, ``"linear"``, ``"yarn"`` and the like.
    - ``has_chat_template``: bool; without one, lines of ``User:`` and ``Assistant:`` are used.
    """

    path: str
    name: str | None
    architecture: str
    quantization: str | None
    parameters: int
    bytes: int
    bits_per_weight: float
    layers: int | None
    embedding_length: int | None
    heads: int | None
    kv_heads: int | None
    experts: int | None
    experts_used: int | None
    n_ctx_train: int | None
    vocabulary: int | None
    tokenizer: str | None
    rope_freq_base: float | None
    rope_scaling: str | None
    has_chat_template: bool

    def as_dict(self) -> dict[str, Any]:
        """The same as a dictionary of its names."""
        return dict(vars(self))


def resources(headers: Sequence[GgufHeader], plan: MemoryPlan, settings: Settings) -> LoadResourceInfo:
    """What ``plan`` says of the model with ``headers`` (of all its files) that is loaded with ``settings``."""
    from runtime.memory.footprint import layer_table
    from runtime.memory.shape import shape_of

    table = layer_table(headers, plan.demand)
    each = tuple(layer.dense + layer.experts + layer.kv for layer in table.layers)
    n_layer = shape_of(headers).n_layer
    gpus = [device for device in plan.devices if device.kind != "cpu"]
    compute = max(device.compute_bytes for device in plan.devices)
    asked = settings.number("n_gpu_layers")
    return LoadResourceInfo(
        vram_bytes=sum(device.used_bytes for device in gpus),
        ram_bytes=sum(device.used_bytes for device in plan.devices if device.kind == "cpu"),
        devices=tuple(device.as_json() for device in plan.devices),
        per_layer_bytes=each[:n_layer],
        output_layer_bytes=table.output,
        input_bytes=table.input,
        layers=n_layer,
        gpu_layers=0 if not gpus else n_layer + 1 if asked < 0 else min(asked, n_layer + 1),
        expected_max_bytes=sum(each) + table.output + compute,
        exact=plan.exact,
        settings=tuple(settings.as_json()),
    )


def model_info(headers: Sequence[GgufHeader]) -> ModelMetaInfo:
    """What ``headers``, those of all files of a model, say."""
    first = headers[0]
    parameters = sum(header.n_params for header in headers)
    size = sum(header.tensor_bytes for header in headers)
    kv_heads = first.arch_ints("attention.head_count_kv")
    rope = first.metadata.get(f"{first.architecture}.rope.freq_base")
    return ModelMetaInfo(
        path=str(first.path),
        name=first.text("general.name"),
        architecture=first.architecture,
        quantization=first.file_type,
        parameters=parameters,
        bytes=size,
        bits_per_weight=8 * size / parameters if parameters else 0.0,
        layers=first.n_layer,
        embedding_length=first.arch_int("embedding_length"),
        heads=max(first.arch_ints("attention.head_count") or (0,)) or None,
        kv_heads=max(kv_heads) if kv_heads else None,
        experts=first.arch_int("expert_count"),
        experts_used=first.arch_int("expert_used_count"),
        n_ctx_train=first.n_ctx_train,
        vocabulary=first.n_vocab,
        tokenizer=first.text("tokenizer.ggml.model"),
        rope_freq_base=rope if isinstance(rope, float) else None,
        rope_scaling=first.text(f"{first.architecture}.rope.scaling.type"),
        has_chat_template=first.chat_template is not None,
    )
