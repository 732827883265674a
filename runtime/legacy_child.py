"""Run as a program: llama.cpp's converter for GGML files of 2023, on a gguf-py that has moved on without it.

    legacy_child.py CONVERTER ARGUMENT...

At llama.cpp commit 0c1e570 the converter names a tensor's shape in elements, where the gguf-py beside it takes the raw
bytes that it is given by their shape in bytes (``GGUFWriter.add_tensor_info``), so that every file is refused. Here a
shape that does not come to the bytes it describes is turned into one that does; a mended converter is left alone.
"""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    script, *arguments = sys.argv[1:]
    sys.path[0] = str(Path(script).parent / "gguf-py")
    import gguf

    add_tensor = gguf.GGUFWriter.add_tensor

    def add(
        self: Any, name: str, tensor: Any, raw_shape: Sequence[int] | None = None, raw_dtype: Any = None, **more: Any
    ) -> None:
        if raw_shape is not None and raw_dtype is not None and math.prod(map(int, raw_shape)) != tensor.nbytes:
            raw_shape = gguf.quant_shape_to_byte_shape(tuple(map(int, raw_shape)), raw_dtype)
        add_tensor(self, name, tensor, raw_shape=raw_shape, raw_dtype=raw_dtype, **more)

    gguf.GGUFWriter.add_tensor = add
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
