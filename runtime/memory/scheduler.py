"""Which backend computes which node, and what is copied between them: ggml's scheduler on described backends.

The passes are those of ggml_backend_sched_split_graph in ggml/src/ggml-backend.cpp (llama.cpp 0c1e570). Backends are
numbered as there: the GPUs in order, the CPU last. Every GPU is taken to support every operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from runtime.memory.graph import VIEW_OPS, Graph, Tensor

_COPIES: Final = 4  # GGML_SCHED_MAX_COPIES
_NOT_BY_WEIGHT: Final = frozenset({"ROPE", "FLASH_ATTN_EXT"})  # their weights are too small to decide


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the allocator is handed: nodes and leafs with the backend that each lies on, in order."""

    nodes: list[tuple[Tensor, int]]
    leafs: list[tuple[Tensor, int]]


def schedule(
    graph: Graph, n_gpus: int, *, offload_rows: int = 0, pipeline: bool = False, fuses: bool = False
) -> Schedule:
    """Split ``graph`` over ``n_gpus`` and the CPU.

    ``offload_rows``: GPU 0 takes over an operation on a weight in host memory when it has at least that many rows (0:
    never), and the weight is copied for it. ``pipeline``: inputs are kept four times, so that the GPUs can work on
    successive micro-batches at once. ``fuses``: the GPUs keep what ``graph.kept`` names. Backends set on nodes before
    the call stay.
    """
    cpu = n_gpus
    if not n_gpus:
        return Schedule(nodes=[(node, 0) for node in graph.nodes], leafs=[(leaf, 0) for leaf in graph.leafs])
    for tensor in (*graph.leafs, *graph.nodes):
        if tensor.backend < 0:
            tensor.backend = _from_current(tensor, cpu, offload_rows)
    _expand(graph, cpu)
    _settle(graph, cpu)
    return _split(graph, cpu, _COPIES if pipeline else 1, fuses)


def _from_current(tensor: Tensor, cpu: int, offload_rows: int) -> int:
    """Pass 1: where the tensor lies, or its first weight; -1 where neither tells."""
    home = tensor.home if tensor.view_src is None else tensor.view_src.home
    if home is not None:
        return home
    if tensor.is_input:
        return cpu
    if tensor.op in _NOT_BY_WEIGHT:
        return -1
    for parent in tensor.src:
        if parent.is_weight:
            assert parent.home is not None
            if offload_rows and parent.home == cpu and parent.is_host and _rows(tensor) >= offload_rows:
                return 0
            return parent.home
    return -1


def _rows(tensor: Tensor) -> int:
    """Rows of an operation's batch (get_op_batch_size of ggml-cuda.cu)."""
    if tensor.op == "GET_ROWS":
        return 0
    if tensor.op == "MUL_MAT":
        return tensor.ne[1]
    if tensor.op in ("MUL_MAT_ID", "ROPE"):
        return tensor.ne[2]
    return tensor.ne[1] * tensor.ne[2] * tensor.ne[3]


def _expand(graph: Graph, cpu: int) -> None:
    """Pass 2: neighbours follow; first the GPUs' down and up, then whatever is left."""
    nodes = [node for node in graph.nodes if node.op not in VIEW_OPS]
    for skipped in (cpu, -1):
        for order in (nodes, nodes[::-1]):
            current = -1
            for node in order:
                if node.backend >= 0:
                    current = -1 if node.backend == skipped else node.backend
                elif current >= 0:
                    node.backend = current


def _settle(graph: Graph, cpu: int) -> None:
    """Passes 3 and 4: views lie with their source, and leafs with their first reader."""
    for node in graph.nodes:
        if node.backend < 0:
            node.backend = node.view_src.backend if node.view_src is not None else cpu
        for parent in node.src:
            if parent.backend < 0:
                parent.backend = parent.view_src.backend if parent.view_src is not None else node.backend


def _split(graph: Graph, cpu: int, n_copies: int, fuses: bool) -> Schedule:
    """Pass 5 and what follows: a run of nodes on one backend, its foreign inputs copied before it."""
    nodes: list[tuple[Tensor, int]] = []
    leafs: list[tuple[Tensor, int]] = []
    kept = graph.kept if fuses else {}
    for inputs, backend, run in _runs(graph, n_copies):
        for source in inputs:
            dependency = Tensor("NONE", source.kind, source.ne, [source], view_of=source, nb=source.nb)
            nodes.append((dependency, source.backend))
            nodes.append((source.copies[backend][0], backend))
            if n_copies > 1:
                leafs.extend((copy, backend) for copy in source.copies[backend])
        if not kept or backend == cpu:
            nodes.extend((node, node.backend) for node in run)
            continue
        for node in run:
            nodes.append((node, node.backend))
            if node in kept:
                first = kept[node][0]
                nodes.append((Tensor("NONE", first.kind, first.ne, kept[node], view_of=first, nb=first.nb), backend))
    if n_copies > 1:
        leafs[:0] = _kept_inputs(graph, n_copies)
    leafs.extend((leaf, leaf.backend) for leaf in graph.leafs)
    return Schedule(nodes=nodes, leafs=leafs)


def _runs(graph: Graph, n_copies: int) -> Iterator[tuple[list[Tensor], int, list[Tensor]]]:
    """(inputs to copy, backend, nodes) of each split, in order."""
    first = next(node for node in graph.nodes if node.op not in VIEW_OPS)
    current, inputs, run = first.backend, list[Tensor](), list[Tensor]()
    for node in graph.nodes:
        if node.op in VIEW_OPS:
            run.append(node)
            continue
        fresh = node.backend == current and inputs and any(p.is_weight and p.home != current for p in node.src)
        if node.backend != current or fresh:
            yield inputs, current, run
            current, inputs, run = node.backend, [], []
        for place, parent in enumerate(node.src):
            if parent.backend == current or _lies_on(parent, current):
                continue
            if current not in parent.copies:
                parent.copies[current] = [_copy(parent, kept=n_copies > 1) for _ in range(n_copies)]
                inputs.append(parent)
            node.src[place] = parent.copies[current][0]
        run.append(node)
    yield inputs, current, run


def _lies_on(tensor: Tensor, backend: int) -> bool:
    source = tensor.view_src or tensor
    return (source.home if source.home is not None else source.backend) == backend


def _copy(tensor: Tensor, *, kept: bool) -> Tensor:
    made = Tensor("NONE", tensor.kind, tensor.ne, [], nb=tensor.nb)
    made.is_input = made.is_output = kept
    return made


def _kept_inputs(graph: Graph, n_copies: int) -> list[tuple[Tensor, int]]:
    """Every input as often as there are micro-batches under way, none of them freed."""
    kept = []
    for leaf in graph.leafs:
        if leaf.is_input:
            leaf.is_output = True
            kept.append((leaf, leaf.backend))
            kept.extend((_copy(leaf, kept=True), leaf.backend) for _ in range(n_copies - 1))
    return kept
