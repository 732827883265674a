"""A GGUF as a transformers model whose matrices stay in their blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from toolchain.base.errors import ArtifactError
from toolchain.lora.torch_engine import experts
from toolchain.lora.torch_engine.architecture import find_architecture, model_config
from toolchain.lora.torch_engine.names import Converted, tensor_names
from toolchain.lora.torch_engine.packed import PackedEmbedding, PackedLinear
from toolchain.lora.torch_engine.positions import divide_frequencies
from toolchain.lora.torch_engine.unpack import Unpacker, require_known
from toolchain.lora.torch_engine.weights_file import WeightsFile


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """``model`` is in eval mode and frozen; ``weight_bytes`` are its tensors as they lie in memory, mapped ones too."""

    model: PreTrainedModel
    weight_bytes: int


def load_base(
    paths: Sequence[Path],
    *,
    lib_dir: Path,
    packed: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    n_threads: int = 1,
) -> Loaded:
    """The model of these files, all shards of one GGUF in order, computing in ``dtype`` on ``device``.

    Packed matrices stay memory maps of the file on a CPU; ``packed=False`` unpacks all of them by the same mapping:
    the yardstick. Either way each linear layer and the embedding bear ``gguf_name``, their tensor's name, and
    ``row_order``: row i of the layer's weight is row ``row_order[i]`` of the tensor; None where the order is the same.
    ``lib_dir`` holds the built libggml-base.

    UsageError: an architecture or a tensor type that is not supported; ArtifactError: tensors that are missing, left
    over, or of another shape than the header says.
    """
    file = WeightsFile(paths)
    architecture = find_architecture(file.first)
    for kind in {tensor.type for tensor in file.tensors.values()}:
        require_known(kind)
    config = model_config(file)
    with init_empty_weights(include_buffers=False):  # buffers are computed, not read: they must be real
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=architecture.attention)
    divide_frequencies(model, file)
    unpacker = Unpacker(lib_dir, n_threads)
    converted = Converted(architecture, config.to_dict())
    _Filling(model, file, unpacker, converted, packed=packed, device=torch.device(device), dtype=dtype).fill()
    model.to(device).requires_grad_(False).eval()
    return Loaded(model=model, weight_bytes=_nbytes(model))


_ANEW: Final = "convert the original model again with the current converter, or choose another base"


class _Filling:
    """Gives every module its tensors: matrices, embedding and experts become packed modules, the rest parameters."""

    def __init__(
        self,
        model: PreTrainedModel,
        file: WeightsFile,
        unpacker: Unpacker,
        converted: Converted,
        *,
        packed: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.file, self.unpacker, self.converted = model, file, unpacker, converted
        self.packed, self.device, self.dtype = packed, device, dtype
        self.names = tensor_names(model, file)
        self.used = {name for name in file.tensors if name.startswith("rope_f")}
        self.shared: dict[str, nn.Parameter] = {}

    def fill(self) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                self._fill_experts(name, module)
                continue
            for own in [key for key, value in module._parameters.items() if value is not None]:
                if own != "weight" or not isinstance(module, nn.Linear | nn.Embedding):
                    self._fill_values(name, own, module)
            if isinstance(module, nn.Linear | nn.Embedding):
                self._fill_matrix(name, module)
        if left := sorted(set(self.file.tensors) - self.used):
            what = "the file has tensors that its model has no place for"
            raise ArtifactError(what, evidence="\n".join(left[:10]), hint=_ANEW)

    def _find(self, parameter: str, shape: tuple[int, ...]) -> str:
        """The name of the parameter's tensor."""
        if parameter not in self.names:
            raise ArtifactError(f"the file has no tensor for {parameter}", hint=_ANEW)
        return self._take(self.names[parameter], shape)

    def _take(self, tensor: str, shape: tuple[int, ...]) -> str:
        """``tensor``, which must be there and have that shape; files and models differ in axes of one element."""
        if tensor not in self.file.tensors:
            raise ArtifactError(f"the file has no tensor {tensor}", hint=_ANEW)
        found = tuple(reversed(self.file.tensors[tensor].shape))
        if [size for size in found if size > 1] != [size for size in shape if size > 1]:
            what = f"{tensor} has another shape than the header says"
            raise ArtifactError(what, evidence=f"{found} and not {shape}", hint=_ANEW)
        self.used.add(tensor)
        return tensor

    def _fill_values(self, name: str, own: str, module: nn.Module) -> None:
        """A norm, a bias, a small convolution: unpacked, with what the converter did to its values undone."""
        if own == "bias" and f"{name}.bias" not in self.names and isinstance(module, nn.Linear):
            module.bias = None  # configurations know one word for several biases, files may have some of them
            return
        shape = tuple(module._parameters[own].shape)
        tensor = self._find(f"{name}.{own}", shape)
        values = self.unpacker.unpack(self.file.rows(tensor), self.file.tensors[tensor].type, torch.float32)
        lying = tuple(reversed(self.file.tensors[tensor].shape))
        values = torch.from_numpy(self.converted.undo(tensor, values.view(lying).numpy())).view(shape)
        setattr(module, own, nn.Parameter(values.to(self.device, self.dtype), requires_grad=False))

    def _fill_matrix(self, name: str, module: nn.Linear | nn.Embedding) -> None:
        tensor = self._find(f"{name}.weight", tuple(module.weight.shape))
        kind = self.file.tensors[tensor].type
        order = self.converted.row_order(tensor, len(module.weight))
        if tensor not in self.shared:  # an embedding that is the output matrix too is one Parameter
            blocks = self.file.rows(tensor) if order is None else self.file.reordered_rows(tensor, order)
            self.shared[tensor] = self._parameter(blocks, kind)
        made: nn.Linear | nn.Embedding
        if not self.packed:
            module.weight, module.gguf_name = self.shared[tensor], tensor
            made = module
        elif isinstance(module, nn.Linear):
            made = PackedLinear(self.shared[tensor], kind, unpacker=self.unpacker, gguf_name=tensor, bias=module.bias)
        else:
            made = PackedEmbedding(
                self.shared[tensor],
                kind,
                unpacker=self.unpacker,
                gguf_name=tensor,
                dtype=self.dtype,
                scale=getattr(module, "embed_scale", None),
            )
        made.row_order = None if order is None else torch.from_numpy(order)
        self.model.set_submodule(name, made)

    def _fill_experts(self, name: str, module: nn.Module) -> None:
        (layer,) = re.findall(r"\.(\d+)\.", name)
        count, rows, width = module.gate_up_proj.shape
        shapes = {"gate": (count, rows // 2, width), "up": (count, rows // 2, width), "down": (count, width, rows // 2)}
        tensors = {part: self._take(f"blk.{layer}.ffn_{part}_exps.weight", shapes[part]) for part in experts.PARTS}
        kinds = {part: self.file.tensors[tensor].type for part, tensor in tensors.items()}
        weights = {part: self._parameter(self.file.blocks(tensor), kinds[part]) for part, tensor in tensors.items()}
        if self.packed:
            made = experts.PackedExperts(weights, kinds, unpacker=self.unpacker, act_fn=module.act_fn)
            self.model.set_submodule(name, made)
        else:
            module.gate_up_proj = nn.Parameter(torch.cat([weights["gate"], weights["up"]], 1), requires_grad=False)
            module.down_proj = weights["down"]

    def _parameter(self, blocks: torch.Tensor, kind: str) -> nn.Parameter:
        """Blocks (..., rows, row_bytes) as they are, or unpacked."""
        if not self.packed:
            rows = self.unpacker.unpack(blocks.view(-1, blocks.shape[-1]), kind, self.dtype)
            blocks = rows.view(*blocks.shape[:-1], -1)
        return nn.Parameter(blocks.to(self.device), requires_grad=False)


def _nbytes(model: nn.Module) -> int:
    tensors = {value.data_ptr(): value.nbytes for value in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())
