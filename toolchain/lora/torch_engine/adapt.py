"""The adapter on a loaded base, by peft: where it goes, and what it is in the GGUF's terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from toolchain.base.errors import UsageError
from toolchain.lora.forms.adapter import AdapterModel, Pair
from toolchain.lora.spec import TrainSpec
from toolchain.lora.torch_engine.adapted import AdaptedLinear
from toolchain.lora.torch_engine.packed import PackedLinear

ADAPTER_NAME: Final = "default"


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """``base`` computes with the adapter in it; ``peft`` is peft's view of the same modules."""

    base: PreTrainedModel
    peft: PeftModel
    parameters: Mapping[str, nn.Parameter]
    """What is trained, float32, in a fixed order."""

    @property
    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """A linear layer of a block: its place in the model and its tensor's suffix in the GGUF."""

    module: str
    suffix: str

    @property
    def short(self) -> str:
        return self.module.rpartition(".")[2]


def adapt(base: PreTrainedModel, spec: TrainSpec) -> Adapted:
    """Put a LoRA adapter, started from the seed, on the matrices that ``spec.targets`` names.

    B is zero at first: the model still computes what the base does. UsageError for names that nothing has.
    """
    matrices = _matrices(base)
    chosen = choose(spec.targets, matrices)
    set_seed(spec.seed % 2**32)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=_named(chosen, base),
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({PackedLinear: AdaptedLinear})
    adapted = get_peft_model(base, config, adapter_name=ADAPTER_NAME)
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    return Adapted(base=base, peft=adapted, parameters=dict(sorted(trained.items())))


def choose(suffixes: Sequence[str], matrices: Sequence[_Matrix]) -> list[_Matrix]:
    """The matrices with these suffixes; UsageError for one that no linear layer has."""
    there = {matrix.suffix for matrix in matrices}
    if unknown := sorted(set(suffixes) - there):
        raise UsageError(
            f"adapter.targets: this base has no linear layer {unknown[0]}",
            evidence=f"it has: {', '.join(sorted(there)) or 'none'}",
            hint="name some of these",
        )
    return [matrix for matrix in matrices if matrix.suffix in suffixes]


def set_training(model: nn.Module, *, checkpointing: bool) -> None:
    """Let the adapter's dropout drop, and nothing else: the base stays the function that the runtime computes.

    transformers recomputes a layer's activations only where the layer itself is in training mode.
    """
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name or (checkpointing and hasattr(module, "gradient_checkpointing")):
            module.training = True


def adapter_model(adapted: Adapted, **named: Any) -> AdapterModel:
    """The adapter by the GGUF's names, its rows in the GGUF's order; ``named``: further fields of AdapterModel.

    The file's alpha makes alpha/rank, which is llama.cpp's scale, the scale of the training, also where that was
    alpha/sqrt(rank) (rsLoRA).
    """
    pairs: dict[str, Pair] = {}
    scale = 1.0
    for module in adapted.base.modules():
        if not hasattr(module, "lora_A") or ADAPTER_NAME not in module.lora_A:
            continue
        layer = module.get_base_layer()
        b = module.lora_B[ADAPTER_NAME].weight
        magnitudes = module.lora_magnitude_vector
        rows = magnitudes[ADAPTER_NAME].weight if ADAPTER_NAME in magnitudes else None
        pairs[layer.gguf_name] = Pair(
            a=_numbers(module.lora_A[ADAPTER_NAME].weight),
            b=_numbers(_in_file_order(b, layer.row_order)),
            magnitude=None if rows is None else _numbers(_in_file_order(rows, layer.row_order)),
        )
        scale = float(module.scaling[ADAPTER_NAME])
    rank = next(iter(pairs.values())).rank
    return AdapterModel(alpha=scale * rank, pairs=pairs, **named)


def _in_file_order(rows: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Row i of the module is row ``order[i]`` of the file."""
    if order is None:
        return rows
    filed = torch.empty_like(rows)
    filed[order.to(rows.device)] = rows
    return filed


def _numbers(tensor: torch.Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()


def _matrices(base: nn.Module) -> list[_Matrix]:
    """The linear layers of the blocks: not the output, no embedding, no stacked experts."""
    found = []
    for name, module in base.named_modules():
        block, _, rest = str(getattr(module, "gguf_name", "")).partition(".")
        if isinstance(module, nn.Linear) and block == "blk":
            found.append(_Matrix(module=name, suffix=rest.partition(".")[2].removesuffix(".weight")))
    return found


def _named(chosen: Iterable[_Matrix], base: nn.Module) -> list[str]:
    """Short names, as people write them in a PEFT configuration, where these mean the same; else each in full."""
    wanted = {matrix.module for matrix in chosen}
    short = {matrix.short for matrix in chosen}
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == wanted else wanted)
