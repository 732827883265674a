"""How much of a cache a prompt can go on from, so that what follows is computed as if nothing had been cached.

Measured with llama.cpp 0c1e570 on CPU: the bits of a row's result depend on how many rows its micro-batch has.
Flash attention computes from 64 rows on in tiles and below that row by row (``GGML_FA_TILE_Q`` in
ggml-cpu/common.h), a lone row in parts of the cache, and the matrix products of repacked weights take rows in
fours from the micro-batch's first. Logits then differ by some 0.05, enough to turn a close choice. A prompt that
goes on at a multiple of ``ROW_GROUP`` rows, with its last micro-batch of the same kind as a cold run's, gives the
same bits. Moving cached tokens to other positions (``llama_memory_seq_add``, llama-server's ``--cache-reuse``) does
not: they were computed after other tokens. It is therefore not done. The cells of a sliding window change places as it
moves, and with them the order of a sum: there a warm run equals a cold one up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

TILE_ROWS: Final = 64
ROW_GROUP: Final = 4

CHECKPOINTS_BYTES: Final = 256 * 2**20
"""Memory at most for states that a recurrent model can go back to."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a model that cannot forget its last tokens, as it was after ``tokens`` of them."""

    tokens: int
    state: bytes


class Checkpoints:
    """The newest checkpoints of one sequence, oldest first, within ``limit_bytes``."""

    def __init__(self, limit_bytes: int = CHECKPOINTS_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._kept: list[Checkpoint] = []

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self._kept)

    def add(self, checkpoint: Checkpoint) -> None:
        """Keep it, at the price of the oldest ones; one that is too large alone is not kept."""
        self._kept = [kept for kept in self._kept if kept.tokens != checkpoint.tokens]
        self._kept.append(checkpoint)
        while sum(len(kept.state) for kept in self._kept) > self.limit_bytes:
            del self._kept[0]

    def before(self, count: int) -> Checkpoint | None:
        """The longest one of at most ``count`` tokens."""
        return max((kept for kept in self._kept if kept.tokens <= count), key=lambda kept: kept.tokens, default=None)

    def cut(self, count: int) -> None:
        """Forget those of more than ``count`` tokens."""
        self._kept = [kept for kept in self._kept if kept.tokens <= count]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that both have; halves are compared whole, which costs less than each token."""
    left, right = list(left), list(right)
    same, most = 0, min(len(left), len(right))
    while same < most:
        middle = (same + most + 1) // 2
        if left[same:middle] == right[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


def resumable(shared: int, length: int, block: int) -> int:
    """Tokens to keep of ``shared`` common ones, for the rest of ``length`` to come out as in a cold run.

    ``block`` is the rows of a micro-batch. A cold run computes [0, block), [block, 2 block), ...; the last of them
    is the one that counts here. At least one token is left to compute, since its logits are wanted.
    """
    most = min(shared, length - 1)
    start = most // block * block
    end = min(start + block, length)
    rows = end - start
    least = TILE_ROWS if rows >= TILE_ROWS else min(rows, 2)
    most = max(start, min(most, end - least))
    return start + (most - start) // ROW_GROUP * ROW_GROUP
