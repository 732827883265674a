"""Which tensor of the GGUF is which parameter of the transformers model, and in which order its rows lie.

Names are gguf-py's own table, by which the converter wrote the file. What the converter did to values is undone by
transformers' tensor processors; asked to process a column of row numbers, they tell how they would reorder rows,
and blocks can then be reordered the same way without being unpacked.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from toolchain.lora.torch_engine.architecture import Architecture
from toolchain.lora.torch_engine.weights_file import WeightsFile

Floats = npt.NDArray[np.float32]


class Converted:
    """What the converter did to the tensors of one model."""

    def __init__(self, architecture: Architecture, config: dict[str, Any]) -> None:
        self._processor: TensorProcessor = TENSOR_PROCESSORS.get(architecture.values, TensorProcessor)(config)

    def row_order(self, name: str, n_rows: int) -> npt.NDArray[np.int64] | None:
        """Where row i of the parameter is found in the tensor ``name``; None where all are in their place."""
        numbers = np.arange(n_rows, dtype=np.int64)
        order = np.ascontiguousarray(self._processor.process(numbers[:, None].copy(), name).weights).reshape(-1)
        assert (np.sort(order) == numbers).all(), f"{name}: more was done to it than reordering its rows"
        return None if (order == numbers).all() else order

    def undo(self, name: str, values: Floats) -> Floats:
        """The values of the small tensor ``name`` as the parameter has them."""
        return np.ascontiguousarray(self._processor.process(values, name).weights)


def tensor_names(model: PreTrainedModel, file: WeightsFile) -> dict[str, str]:
    """The tensor of ``file`` for each parameter of ``model`` that has one; a tied output matrix has the embedding's."""
    header = file.first
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[header.architecture], header.n_layer or 0)
    names = {}
    for parameter in model.state_dict():
        stem, _, suffix = parameter.rpartition(".")
        names[parameter] = f"{table.get_name(stem)}.{suffix}"
    for parameter in names:
        if parameter.startswith("lm_head."):  # which gguf-py's table leaves out where it is always tied
            tied = "output.weight" not in file.tensors
            names[parameter] = "token_embd.weight" if tied else parameter.replace("lm_head", "output")
    return {parameter: tensor for parameter, tensor in names.items() if tensor in file.tensors}
