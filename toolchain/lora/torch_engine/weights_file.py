"""The tensors of a GGUF, all its shards, as they lie in the files: mapped, not read."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from toolchain.base.errors import UsageError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import GgufHeader, TensorInfo, read_header


class WeightsFile:
    """Tensors by name. Mapped blocks are shared by all processes that read the file, and are never written.

    The mapping is a private one, writable as torch demands: a write would change this process's copy and not the file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.headers = [read_header(path) for path in paths]
        self._place: dict[str, tuple[GgufHeader, TensorInfo]] = {
            tensor.name: (header, tensor) for header in self.headers for tensor in header.tensors
        }
        self._tensors = {name: tensor for name, (_, tensor) in self._place.items()}
        self._maps: dict[Path, torch.Tensor] = {}

    @property
    def first(self) -> GgufHeader:
        """The header with the metadata."""
        return self.headers[0]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def floats(self, name: str) -> torch.Tensor:
        """The float32 vector ``name``, mapped."""
        if self._tensors[name].type != "F32":
            raise UsageError(f"{name} is of type {self._tensors[name].type} and not F32")
        return self.blocks(name).view(torch.float32)

    def blocks(self, name: str) -> torch.Tensor:
        """The blocks of the tensor, mapped: uint8 (rows, row_bytes), of three dimensions (experts, rows, row_bytes)."""
        header, tensor = self._place[name]
        start = header.data_offset + tensor.offset
        flat = self._map(header.path)[start : start + tensor.nbytes]
        return flat.view(*reversed(tensor.shape[1:]), self.row_bytes(name))

    def rows(self, name: str) -> torch.Tensor:
        """As ``blocks``, of two dimensions whatever the tensor has."""
        return self.blocks(name).view(-1, self.row_bytes(name))

    def reordered_rows(self, name: str, order: npt.NDArray[np.int64]) -> torch.Tensor:
        """The rows in ``order``, read from the file into memory of our own; the mapping is not touched."""
        header, tensor = self._place[name]
        row_bytes = self.row_bytes(name)
        rows = torch.empty(len(order), row_bytes, dtype=torch.uint8)
        place = torch.from_numpy(np.argsort(order))
        step = max(1, _READ_BYTES // row_bytes)
        with header.path.open("rb") as source:
            source.seek(header.data_offset + tensor.offset)
            for first in range(0, len(order), step):
                data = bytearray(source.read(min(step, len(order) - first) * row_bytes))
                part = torch.frombuffer(data, dtype=torch.uint8).view(-1, row_bytes)
                rows[place[first : first + step]] = part
        return rows

    def row_bytes(self, name: str) -> int:
        tensor = self._place[name][1]
        return GGML_TYPES_BY_NAME[tensor.type].nbytes(tensor.shape[0])

    def _map(self, path: Path) -> torch.Tensor:
        if path not in self._maps:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[path] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._maps[path]


_READ_BYTES = 4 * 2**20
