"""Examples to rows of ``n_ctx`` tokens, several short ones in a row where that is asked for.

Which share a row is best-fit decreasing: the longest first, each into the row that it fills most. Documents stay whole,
and hardly anything is padded (arXiv 2404.10830). Their positions begin anew, and they do not see each other.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from toolchain.lora.dataset_file import IGNORED, Rows, Tokens


class Examples:
    """Examples of at most ``n_ctx`` tokens, cut where they are longer; those without anything to learn are dropped.

    The first token of an example is never learned: nothing stands before it to predict it from.
    """

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self.cut = self.dropped = self.longest = 0
        self._ids, self._learned = array("i"), bytearray()
        self._ends, self._repeats = array("q", [0]), array("q")

    def __len__(self) -> int:
        return len(self._repeats)

    def add(self, ids: Sequence[int] | Tokens, learned: bytes, *, repeat: int = 1, length: int = 0) -> None:
        """``learned`` has 1 for each token that counts; ``length`` is how long it was, where an end is missing."""
        length = max(length, len(ids))
        self.longest = max(self.longest, length)
        last = learned.rfind(1, 1, self.n_ctx)
        if last < 0:
            self.dropped += repeat
            return
        self.cut += repeat * (learned.find(1, self.n_ctx) >= 0 or length > len(ids))
        kept = last + 1  # what lies behind it would be computed for nothing
        self._ids.frombytes(np.asarray(ids[:kept], np.int32).tobytes())
        self._learned += b"\0" + learned[1:kept]
        self._ends.append(len(self._ids))
        self._repeats.append(repeat)

    def add_windows(self, tokens: Tokens, *, repeat: int = 1) -> None:
        """A text, all of it learned, as windows one after another; the first token of each is not learned.

        A single token at the end is left out: it has nothing before it.
        """
        self.longest = max(self.longest, min(len(tokens), self.n_ctx))
        for start in range(0, len(tokens) - 1, self.n_ctx):
            window = tokens[start : start + self.n_ctx]
            if len(window) > 1:
                self.add(window, b"\1" * len(window), repeat=repeat)

    @property
    def count(self) -> int:
        """Examples in an epoch."""
        return sum(self._repeats)

    @property
    def tokens(self) -> int:
        """Tokens in an epoch."""
        return int((self._lengths() * np.array(self._repeats)).sum())

    def beginning(self, most: int) -> Tokens:
        """The first tokens, ``most`` at most, of the first example that has so many, else of the longest one."""
        example = int(self._lengths().clip(max=most).argmax())
        start, end = self._ends[example], self._ends[example + 1]
        return np.array(self._ids[start : min(end, start + most)], np.int32)

    def rows(self, *, packing: bool, seed: int, padding: int = 0) -> Rows:
        """An epoch's rows, in an order that ``seed`` decides; ``padding`` is any token of the vocabulary.

        A row's unused end is an example of its own that nobody learns.
        """
        random = np.random.default_rng(seed % 2**64)
        order = random.permutation(np.repeat(np.arange(len(self)), np.array(self._repeats, np.int64)))
        lengths = self._lengths()
        if packing:
            longest_first = order[np.argsort(-lengths[order], kind="stable")].tolist()
            filled = _best_fit(longest_first, lengths.tolist(), self.n_ctx)
            filled = [filled[row] for row in random.permutation(len(filled))]
        else:
            filled = [[example] for example in order.tolist()]
        return self._laid_out(filled, padding)

    def _lengths(self) -> NDArray[np.int64]:
        ends = np.array(self._ends, np.int64)
        return ends[1:] - ends[:-1]

    def _laid_out(self, filled: Sequence[Iterable[int]], padding: int) -> Rows:
        shape = len(filled), self.n_ctx
        rows = Rows(
            ids=np.full(shape, padding, np.int32),
            labels=np.full(shape, IGNORED, np.int32),
            positions=np.empty(shape, np.int32),
        )
        all_ids, all_learned = np.frombuffer(self._ids, np.int32), np.frombuffer(self._learned, np.bool_)
        places = np.arange(self.n_ctx, dtype=np.int32)
        for row, examples in enumerate(filled):
            at = 0
            for example in examples:
                start, end = self._ends[example], self._ends[example + 1]
                span = slice(at, at := at + end - start)
                ids, learned = all_ids[start:end], all_learned[start:end]
                rows.ids[row, span] = ids
                rows.labels[row, span][learned] = ids[learned]
                rows.positions[row, span] = places[: end - start]
            rows.positions[row, at:] = places[: self.n_ctx - at]
        return rows


def _best_fit(examples: Iterable[int], lengths: Sequence[int], n_ctx: int) -> list[list[int]]:
    """Rows of examples, ``examples`` being sorted by length, the longest first."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of with_room, sorted
    for example in examples:
        length = lengths[example]
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, row = n_ctx, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(example)
        left = room - length
        if left not in with_room:
            bisect.insort(rooms, left)
        with_room.setdefault(left, []).append(row)
    return rows
