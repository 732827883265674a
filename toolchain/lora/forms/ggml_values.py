"""GGUF blocks to numbers and back, by the built libggml-base itself, on several cores.

``to_float`` and ``ggml_quantize_chunk`` are called through ctypes, which lets go of the interpreter: rows are shared
out over threads. Packing gives the bytes that llama-quantize writes. No torch here: merging needs none.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from toolchain.base.errors import ArtifactError, MissingError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Blocks: TypeAlias = NDArray[np.uint8]
    Floats: TypeAlias = NDArray[np.float32]

ToFloat: TypeAlias = Callable[[int, int, int], None]

_ToFloat: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_PIECE_ELEMENTS: Final = 1 << 16
"""The least work that is worth a thread."""


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class GgmlValues:
    """An open libggml-base. Types are named as in ``ggml_types``; arrays are C-contiguous, rows first."""

    lib: Any
    n_threads: int

    def unpack(self, blocks: Blocks, type: str, out: Floats | None = None) -> Floats:
        """(rows, cols) float32 of ``blocks`` (rows, bytes of a row), into ``out`` where it is given."""
        import numpy as np

        kind = GGML_TYPES_BY_NAME[type]
        rows, row_bytes = blocks.shape
        cols = row_bytes // kind.block_bytes * kind.block_size
        values = np.empty((rows, cols), np.float32) if out is None else out
        assert values.shape == (rows, cols)
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        assert blocks.flags.c_contiguous
        if type == "F32":
            np.copyto(values, blocks.view(np.float32))
            return values
        to_float = self.to_float(type)
        source, target = blocks.ctypes.data, values.ctypes.data
        self._share(rows, cols, lambda i, n: to_float(source + i * row_bytes, target + 4 * i * cols, n * cols))
        return values

    def pack(self, values: Floats, type: str) -> Blocks:
        """(rows, bytes of a row) of ``values`` (rows, cols), which are finite. ArtifactError: see ``needs_imatrix``."""
        import numpy as np

        if self.needs_imatrix(type):
            raise ArtifactError(f"{type} cannot be made without an importance matrix", hint="choose another type")
        kind = GGML_TYPES_BY_NAME[type]
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        rows, cols = values.shape
        row_bytes = kind.nbytes(cols)
        blocks = np.empty((rows, row_bytes), np.uint8)
        source, target = values.ctypes.data, blocks.ctypes.data

        def quantize(i: int, n: int) -> None:
            self.lib.ggml_quantize_chunk(kind.id, source + 4 * i * cols, target + i * row_bytes, 0, n, cols, None)

        self._share(rows, cols, quantize)
        return blocks

    def needs_imatrix(self, type: str) -> bool:
        """Whether ``pack`` refuses: the library would abort without an importance matrix."""
        return bool(self.lib.ggml_quantize_requires_imatrix(GGML_TYPES_BY_NAME[type].id))

    def to_float(self, type: str) -> ToFloat:
        """The library's own function of that type: (address of blocks, address of floats, how many floats).

        What the library says of the type's blocks is held against our table. ArtifactError when it has none.
        """
        kind = GGML_TYPES_BY_NAME[type]
        traits = self.lib.ggml_get_type_traits(kind.id).contents
        if (traits.blck_size, traits.type_size) != (kind.block_size, kind.block_bytes):
            said = f"blocks of {traits.blck_size} weights in {traits.type_size} bytes"
            raise ArtifactError(f"the built library's {type} is another type than this program's", evidence=said)
        if not traits.to_float:
            raise ArtifactError(f"tensors of type {type} cannot be unpacked", hint="choose another file of the model")
        return _ToFloat(traits.to_float)

    def _share(self, rows: int, cols: int, work: Callable[[int, int], object]) -> None:
        """``work(first, count)`` for all rows, in as many pieces as there are threads and work for them."""
        pieces = max(1, min(self.n_threads, rows, rows * cols // _PIECE_ELEMENTS))
        if pieces == 1:
            work(0, rows)
            return
        bounds = [rows * piece // pieces for piece in range(pieces + 1)]
        firsts, counts = bounds[:-1], [after - at for at, after in pairwise(bounds)]
        list(_threads(self.n_threads).map(work, firsts, counts))


def open_values(lib_dir: Path, n_threads: int) -> GgmlValues:
    """The libggml-base in ``lib_dir`` of a Toolchain; MissingError when it is not there."""
    path = lib_dir / ("libggml-base.dylib" if sys.platform == "darwin" else "libggml-base.so")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingError(f"{path} cannot be loaded", evidence=str(error), hint="run `./inv build`") from error
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return GgmlValues(lib=lib, n_threads=n_threads)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="ggml")
