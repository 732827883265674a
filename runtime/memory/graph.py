"""Tensors and graphs as ggml makes them: shapes, strides, views and the order of nodes, but no data.

Each function below gives the tensor that the function of the same name in ggml/src/ggml.c (llama.cpp 0c1e570) would
give: its type, its extents ``ne`` (ne[0] first), its strides ``nb`` in bytes and what it is a view of. That is all
that decides how much memory a graph takes.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from toolchain.base.ggml_types import GGML_TYPES_BY_NAME

Shape: TypeAlias = tuple[int, int, int, int]

VIEW_OPS: Final = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
_BLOCKS: Final = {name: (kind.block_size, kind.block_bytes) for name, kind in GGML_TYPES_BY_NAME.items()}


def row_bytes(kind: str, elements: int) -> int:
    """Bytes of a row (ggml_row_size); ``kind`` in the upper-case spelling of GGML_TYPES_BY_NAME."""
    block, size = _BLOCKS[kind]
    return elements // block * size


class Tensor:
    """One tensor. ``home`` is the backend whose buffer holds it already (weights, caches), None for the graph's own.

    The fields after ``home`` are the scratch of one pass of the scheduler and the allocator.
    """

    __slots__ = (
        *("op", "kind", "ne", "nb", "nbytes", "view_src", "src", "is_input", "is_output", "is_weight", "is_host"),
        *("home", "seen", "backend", "copies", "own", "children", "views", "at", "pool"),
    )

    def __init__(
        self,
        op: str,
        kind: str,
        ne: Shape,
        src: list[Tensor],
        *,
        view_of: Tensor | None = None,
        nb: Shape | None = None,
    ) -> None:
        block, size = _BLOCKS[kind]
        if nb is None:
            row = ne[0] // block * size
            nb = (size, row, row * ne[1], row * ne[1] * ne[2])
            self.nbytes = row * ne[1] * ne[2] * ne[3]
        elif 0 in ne:
            self.nbytes = 0
        else:
            self.nbytes = ne[0] * nb[0] // block + (ne[1] - 1) * nb[1] + (ne[2] - 1) * nb[2] + (ne[3] - 1) * nb[3]
        self.op, self.kind, self.ne, self.nb, self.src = op, kind, ne, nb, src
        self.view_src: Tensor | None = None if view_of is None else view_of.view_src or view_of
        self.is_input = self.is_output = self.is_weight = self.seen = self.own = False
        self.is_host = True
        self.home: int | None = None
        self.backend, self.at, self.pool, self.children, self.views = -1, 0, 0, 0, 0
        self.copies: dict[int, list[Tensor]] = {}

    @property
    def is_contiguous(self) -> bool:
        block, size = _BLOCKS[self.kind]
        row = self.ne[0] // block * size
        return self.nb == (size, row, row * self.ne[1], row * self.ne[1] * self.ne[2])

    @property
    def is_quantized(self) -> bool:
        return _BLOCKS[self.kind][0] > 1

    @property
    def n_elements(self) -> int:
        return self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]


class Graph:
    """Nodes and leafs in the order in which ggml_build_forward_expand meets them."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []
        self.leafs: list[Tensor] = []
        self.kept: dict[Tensor, list[Tensor]] = {}
        """By node: tensors that a backend which fuses operations needs until then (add_alloc_dep in ggml-backend)."""

    def expand(self, tensor: Tensor) -> Tensor:
        """Add ``tensor`` after all that it needs (ggml_visit_parents_graph, left to right)."""
        if not tensor.seen:
            tensor.seen = True
            for parent in tensor.src:
                if not parent.seen:
                    self.expand(parent)
            (self.leafs if tensor.op == "NONE" else self.nodes).append(tensor)
        return tensor


def leaf(kind: str, *extents: int) -> Tensor:
    return Tensor("NONE", kind, _four(extents), [])


def graph_input(kind: str, *extents: int) -> Tensor:
    """A tensor that the caller fills before the graph runs (ggml_set_input)."""
    made = leaf(kind, *extents)
    made.is_input = True
    return made


def held(kind: str, extents: tuple[int, ...], home: int, *, weight: bool, host: bool = True) -> Tensor:
    """A tensor that lies in a buffer already. ``host``: one that programs may read (CPU_REPACK's is none)."""
    made = leaf(kind, *extents)
    made.home, made.is_weight, made.is_host = home, weight, host
    return made


def like(op: str, a: Tensor, *others: Tensor) -> Tensor:
    """Any operation whose result has the type and shape of its first operand, contiguous (ggml_dup_tensor)."""
    return Tensor(op, a.kind, a.ne, [a, *others])


def mul_mat(a: Tensor, b: Tensor) -> Tensor:
    return Tensor("MUL_MAT", "F32", (a.ne[1], b.ne[1], b.ne[2], b.ne[3]), [a, b])


def mul_mat_id(experts: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return Tensor("MUL_MAT_ID", "F32", (experts.ne[1], ids.ne[0], b.ne[2], 1), [experts, b, ids])


def get_rows(a: Tensor, rows: Tensor) -> Tensor:
    kind = "I32" if a.kind == "I32" else "F32"
    return Tensor("GET_ROWS", kind, (a.ne[0], rows.ne[0], rows.ne[1], rows.ne[2]), [a, rows])


def set_rows(cache: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    return Tensor("SET_ROWS", cache.kind, cache.ne, [values, rows, cache], view_of=cache, nb=cache.nb)


def cpy(a: Tensor, onto: Tensor) -> Tensor:
    return Tensor("CPY", onto.kind, onto.ne, [a, onto], view_of=onto, nb=onto.nb)


def scale_inplace(a: Tensor) -> Tensor:
    return Tensor("SCALE", a.kind, a.ne, [a], view_of=a, nb=a.nb)


def flash_attn_ext(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return Tensor("FLASH_ATTN_EXT", "F32", (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), [q, k, v, mask])


def argsort(a: Tensor) -> Tensor:
    return Tensor("ARGSORT", "I32", a.ne, [a])


def sum_rows(a: Tensor) -> Tensor:
    return Tensor("SUM_ROWS", a.kind, (1, a.ne[1], a.ne[2], a.ne[3]), [a])


def glu(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Gate and value as two tensors, or as the two halves of one."""
    if b is None:
        return Tensor("GLU", a.kind, (a.ne[0] // 2, a.ne[1], a.ne[2], a.ne[3]), [a])
    return Tensor("GLU", a.kind, a.ne, [a, b])


def concat(a: Tensor, b: Tensor) -> Tensor:
    """One after the other along ne[0]."""
    return Tensor("CONCAT", a.kind, (a.ne[0] + b.ne[0], a.ne[1], a.ne[2], a.ne[3]), [a, b])


def pad(a: Tensor, more: int) -> Tensor:
    return Tensor("PAD", a.kind, (a.ne[0] + more, a.ne[1], a.ne[2], a.ne[3]), [a])


def cont(a: Tensor, *extents: int) -> Tensor:
    return Tensor("CONT", a.kind, _four(extents) if extents else a.ne, [a])


def reshape(a: Tensor, *extents: int) -> Tensor:
    return Tensor("RESHAPE", a.kind, _four(extents), [a], view_of=a)


def view(a: Tensor, extents: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """``strides``: nb[1] and on, in bytes; those not given follow from the extents."""
    ne = _four(extents)
    nb = [_BLOCKS[a.kind][1], *strides]
    if len(nb) == 1:
        nb.append(row_bytes(a.kind, ne[0]))
    while len(nb) < 4:
        nb.append(nb[-1] * ne[len(nb) - 1])
    return Tensor("VIEW", a.kind, ne, [a], view_of=a, nb=(nb[0], nb[1], nb[2], nb[3]))


def permute(a: Tensor, *places: int) -> Tensor:
    """Dimension i of ``a`` goes to place ``places[i]``."""
    ne, nb = [0] * 4, [0] * 4
    for axis, place in enumerate(places):
        ne[place], nb[place] = a.ne[axis], a.nb[axis]
    return Tensor("PERMUTE", a.kind, (ne[0], ne[1], ne[2], ne[3]), [a], view_of=a, nb=(nb[0], nb[1], nb[2], nb[3]))


def transpose(a: Tensor) -> Tensor:
    ne, nb = (a.ne[1], a.ne[0], a.ne[2], a.ne[3]), (a.nb[1], a.nb[0], a.nb[2], a.nb[3])
    return Tensor("TRANSPOSE", a.kind, ne, [a], view_of=a, nb=nb)


def _four(extents: tuple[int, ...]) -> Shape:
    ne = (*extents, 1, 1, 1)
    return (ne[0], ne[1], ne[2], ne[3])
