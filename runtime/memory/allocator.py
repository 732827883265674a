"""How ggml packs a graph's tensors into one buffer for each backend: its allocator, without the memory.

The method is that of ggml_gallocr in ggml/src/ggml-alloc.c (llama.cpp 0c1e570): inputs first, then node by node; an
operation that can works in place of an operand that nobody needs any more; else the smallest free block that holds
the tensor, and only when there is none the end of the buffer; a tensor's block is free again after its last reader.
The peak of each buffer is its size. Buffers with a size limit (Vulkan's, which ggml then cuts into chunks) are taken
for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from runtime.memory.graph import Tensor

_IN_PLACE: Final = frozenset(  # ggml_op_can_inplace
    {
        *("FILL", "SCALE", "DIAG_MASK_ZERO", "DIAG_MASK_INF", "ADD", "ADD_ID", "ADD1", "SUB", "MUL", "DIV", "SQR"),
        *("SQRT", "LOG", "UNARY", "ROPE", "ROPE_BACK", "SILU_BACK", "RMS_NORM", "RMS_NORM_BACK", "CLAMP", "SOFT_MAX"),
        "SOFT_MAX_BACK",
    }
)
_ENDLESS: Final = 2**62

AllocSize: TypeAlias = Callable[[Tensor, int], int]


def buffer_sizes(
    nodes: Sequence[tuple[Tensor, int]],
    leafs: Sequence[tuple[Tensor, int]],
    alignments: Sequence[int],
    size_of: AllocSize,
) -> tuple[int, ...]:
    """Bytes of the buffer of each backend for a scheduled graph: tensors with the backend that makes them.

    ``size_of(tensor, backend)`` is what the backend's buffer type asks for the tensor.
    """
    pools = [_Pool(alignment) for alignment in alignments]
    packer = _Packer(pools, size_of)
    for tensor, backend in leafs:
        packer.place(tensor, backend)
    for node, backend in nodes:
        if node.view_src is not None and node.op != "NONE":
            node.view_src.views += 1
        if node.is_input:
            packer.place(node, backend)
        for parent in node.src:
            parent.children += 1
            if parent.is_input and not parent.own:
                packer.place(parent, backend)
    for node, backend in nodes:
        for parent in node.src:
            if parent.home is None and not parent.own and parent.view_src is None:
                packer.place(parent, backend)
        packer.place(node, backend)
        for parent in node.src:
            packer.release(parent)
    return tuple(pool.peak for pool in pools)


class _Pool:
    """One buffer: its free blocks [offset, size] by offset; the last one has no end."""

    __slots__ = ("alignment", "blocks", "peak")

    def __init__(self, alignment: int) -> None:
        self.alignment, self.peak = alignment, 0
        self.blocks = [[0, _ENDLESS]]

    def padded(self, size: int) -> int:
        return (size + self.alignment - 1) // self.alignment * self.alignment

    def take(self, size: int) -> int:
        size = self.padded(size)
        best, best_size = len(self.blocks) - 1, _ENDLESS
        for index, (_offset, free) in enumerate(self.blocks[:-1]):
            if size <= free <= best_size:  # the last of the smallest
                best, best_size = index, free
        block = self.blocks[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if not block[1]:
            del self.blocks[best]
        self.peak = max(self.peak, offset + size)
        return offset

    def give(self, offset: int, size: int) -> None:
        size = self.padded(size)
        blocks = self.blocks
        for index, block in enumerate(blocks):
            if block[0] + block[1] == offset:
                block[1] += size
                if index + 1 < len(blocks) and block[0] + block[1] == blocks[index + 1][0]:
                    block[1] += blocks[index + 1][1]
                    del blocks[index + 1]
                return
            if offset + size == block[0]:
                block[0] = offset
                block[1] += size
                if index and blocks[index - 1][0] + blocks[index - 1][1] == offset:
                    blocks[index - 1][1] += block[1]
                    del blocks[index]
                return
        at = next((index for index, block in enumerate(blocks) if block[0] >= offset), len(blocks))
        blocks.insert(at, [offset, size])


class _Packer:
    def __init__(self, pools: Sequence[_Pool], size_of: AllocSize) -> None:
        self.pools, self.size_of = pools, size_of

    def place(self, tensor: Tensor, backend: int) -> None:
        """A place for ``tensor`` unless it has one; views have none of their own."""
        if tensor.home is not None or tensor.own or tensor.view_src is not None:
            return
        tensor.own = True
        if tensor.op in _IN_PLACE and any(self._reuse(tensor, parent) for parent in tensor.src):
            return
        tensor.pool = backend
        tensor.at = self.pools[backend].take(self.size_of(tensor, backend))

    def release(self, parent: Tensor) -> None:
        """One reader of ``parent`` is done."""
        parent.children -= 1
        if parent.children or parent.views:
            return
        source = parent.view_src
        if source is None:
            if parent.own:
                self._free(parent)
        else:
            source.views -= 1
            if not source.views and not source.children and source.own:
                self._free(source)

    def _free(self, tensor: Tensor) -> None:
        if not tensor.is_output:
            self.pools[tensor.pool].give(tensor.at, self.size_of(tensor, tensor.pool))
            tensor.own = False

    def _reuse(self, tensor: Tensor, parent: Tensor) -> bool:
        """Whether ``tensor`` took over the place of ``parent``, whose last reader it is.

        ggml has a branch for operands that are views, but it marks no view as its own, so it never gets there.
        """
        if not parent.own or parent.is_output or parent.children != 1 or parent.views:
            return False
        if parent.kind != tensor.kind or parent.ne != tensor.ne or parent.nb != tensor.nb:
            return False
        parent.own = False
        tensor.pool, tensor.at = parent.pool, parent.at
        pool = self.pools[parent.pool]
        whole, used = pool.padded(self.size_of(parent, parent.pool)), pool.padded(self.size_of(tensor, tensor.pool))
        if whole > used:
            pool.give(parent.at + used, whole - used)
        return True
