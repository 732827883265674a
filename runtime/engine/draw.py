"""Drawing a token from a row of logits, by the cheapest way that gives what the sampler chain gives.

The library's own ``llama_sampler_sample`` lays out a candidate for each token of the vocabulary each time. That is
nothing for 4,000 tokens, and 0.1 ms and more for 128,000; numpy finds the best, or a few that hold the K best, in
a fraction of it.
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.engine.grammar import parse_grammar
from runtime.engine.logprobs import Rows
from runtime.engine.model import Model
from runtime.engine.sampling import SamplingOptions, build_chain
from runtime.engine.text import Pieces
from toolchain.base.errors import UsageError

LARGE_FOR_BEST: Final = 16_384
LARGE_FOR_TOP_K: Final = 49_152
"""Vocabularies from which on numpy pays, measured within the loop, where each of its calls meets cold caches.

Saved a token: the best one 0.02 ms of 32,000 tokens, 0.2 of 128,000; the K best -0.03, 0.02 (64,000), 0.1 and 0.2
(256,000), which was 5 percent of the time of the models measured.
"""

_PATIENCE: Final = 8  # tries before all tokens that the grammar allows are looked at
_LANES: Final = 64  # a maximum over so many strided parts is one vector instruction each
_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Sampler:
    """A sampler chain and a grammar for one reply; ``draw(row)`` gives a token and moves both on.

    Rows are those of the last batch, as ``llama_get_logits_ith`` counts them. ``close`` frees what the library holds.
    """

    def __init__(
        self, model: Model, handle: Any, options: SamplingOptions, *, rows: Rows, pieces: Pieces, prompt: list[int]
    ) -> None:
        self._lib = model.lib
        self._rows = rows
        self._pieces = pieces
        self._grammar = parse_grammar(model, options.grammar) if options.grammar else None
        self._chain: Any = None
        try:
            self._chain = build_chain(model, options, prompt)
        except BaseException:
            self.close()
            raise
        self._top_k = options.top_k
        self._open = b""
        of_top_k = options.begins_with_top_k and model.n_vocab >= LARGE_FOR_TOP_K
        self._candidates = _Candidates(model) if self._grammar or of_top_k else None
        self.draw: Callable[[int], int] = partial(model.lib.llama_sampler_sample, self._chain, handle)
        if self._grammar:
            self.draw = self._draw_by_grammar
        elif options.greedy and model.n_vocab >= LARGE_FOR_BEST:
            self.draw = self._draw_best
        elif of_top_k:
            self.draw = self._draw_of_top_k

    def close(self) -> None:
        """Free the chain and the grammar; a second call does nothing."""
        for sampler in filter(None, (self._chain, self._grammar)):
            self._lib.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def _draw_best(self, row: int) -> int:
        return int(self._rows[row].argmax())

    def _draw_of_top_k(self, row: int) -> int:
        logits = self._rows[row]
        ids = _holding_top(logits, self._top_k)
        token = self._choose(ids, logits[ids])
        self._lib.llama_sampler_accept(self._chain, token)
        return token

    def _draw_by_grammar(self, row: int) -> int:
        """As llama.cpp's ``common_sampler_sample``: draw freely, and by the grammar only if it refuses that token."""
        logits = self._rows[row]
        everything = np.arange(len(logits), dtype=np.int32)
        token = self._choose(everything, logits)
        if not self._is_text(token) or not len(self._allowed(np.array([token], np.int32))):
            ids = self._allowed(everything)
            for _ in range(_PATIENCE):
                token = self._choose(ids, logits[ids])
                if self._is_text(token):
                    break
                ids = ids[ids != token]
            else:
                ids = np.array([each for each in ids.tolist() if self._is_text(each)], np.int32)
                token = self._choose(ids, logits[ids])
        for sampler in (self._chain, self._grammar):
            self._lib.llama_sampler_accept(sampler, token)
        self._open = self._characters(token) or b""
        return token

    def _is_text(self, token: int) -> bool:
        """What a grammar of the library does not ask: it reads the names of control tokens, and any bytes, as text."""
        return self._pieces[token] is None or self._characters(token) is not None

    def _characters(self, token: int) -> bytes | None:
        """What ``token`` leaves of an unfinished character; None if it has no text or breaks a character."""
        piece = self._pieces[token]
        if not piece or (self._open and isinstance(piece, str)):
            return None
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            decoder.decode(self._open + (piece.encode() if isinstance(piece, str) else piece))
        except UnicodeDecodeError:
            return None
        return decoder.getstate()[0]

    def _choose(self, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> int:
        """What the chain chooses of the tokens ``ids``, whose logits are given."""
        assert self._candidates is not None
        array = self._candidates.lay(ids, logits)
        if len(ids):
            self._lib.llama_sampler_apply(self._chain, self._candidates.reference)
            chosen = array.data[array.selected]
            if chosen.logit > -np.inf:
                return int(chosen.id)
        raise UsageError(
            "no token is left to go on with",
            evidence="the grammar and the logit bias together forbid every token of the vocabulary",
            hint="change the grammar (--grammar, --json-schema), or ban fewer tokens (--logit-bias)",
        )

    def _allowed(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those of ``ids`` with which the grammar can go on, or end."""
        assert self._candidates is not None
        self._candidates.lay(ids, np.zeros(len(ids), np.float32))
        self._lib.llama_sampler_apply(self._grammar, self._candidates.reference)
        allowed: NDArray[np.int32] = ids[self._candidates.logits(len(ids)) == 0]
        return allowed


class _Candidates:
    """The library's ``llama_token_data_array`` over memory that numpy fills."""

    def __init__(self, model: Model) -> None:
        self._memory = np.zeros(model.n_vocab, _CANDIDATE)
        self._data = ctypes.cast(self._memory.ctypes.data, ctypes.POINTER(model.lib.llama_token_data))
        self._array = model.lib.llama_token_data_array()
        self.reference = ctypes.byref(self._array)

    def lay(self, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> Any:
        """The array with these candidates in it."""
        rows = self._memory[: len(ids)]
        rows["id"], rows["logit"] = ids, logits
        array = self._array
        array.data, array.size, array.selected, array.sorted = self._data, len(ids), -1, False
        return array

    def logits(self, count: int) -> NDArray[np.float32]:
        """Those of the first ``count`` candidates as they are now."""
        found: NDArray[np.float32] = self._memory["logit"][:count]
        return found


def _holding_top(logits: NDArray[np.float32], count: int) -> NDArray[np.int32]:
    """Ids of a few tokens that hold the ``count`` likeliest.

    The count-th largest of the maxima of disjoint parts is no more than the count-th largest of all.
    """
    parts = len(logits) // _LANES
    if count < parts:
        maxima = logits[: parts * _LANES].reshape(_LANES, parts).max(axis=0)
        floor = np.partition(maxima, parts - count)[parts - count]
        ids = np.flatnonzero(logits >= floor).astype(np.int32)
        if len(ids) >= count:  # fewer: some logits are no numbers
            return ids
    return np.arange(len(logits), dtype=np.int32)
