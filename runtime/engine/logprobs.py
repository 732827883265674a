"""The logits of the last decode as arrays, and log-probabilities of tokens from them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.engine.model import Model

Adjust: TypeAlias = Callable[[NDArray[np.float32]], None]
"""Gets a row of logits (one for each token of the vocabulary) before a token is drawn, and may write into it."""


class Candidate(NamedTuple):
    """A token, its bytes (a control token's are its name) and the natural logarithm of its probability."""

    token: int
    piece: bytes
    logprob: float


class TokenLogprob(NamedTuple):
    """A token that was drawn, and beside it the likeliest ones, best first, whichever was drawn."""

    token: int
    piece: bytes
    logprob: float
    top: tuple[Candidate, ...]


class Rows:
    """The rows of logits of a context, as views of the library's memory that the next decode writes over."""

    def __init__(self, model: Model, handle: Any) -> None:
        self._row = model.lib.llama_get_logits_ith
        self._handle = handle
        self._n_vocab = model.n_vocab
        self._views: dict[int, NDArray[np.float32]] = {}

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        """Row ``row`` of the last batch (-1: the last that has logits); float32, one for each token."""
        address = ctypes.addressof(self._row(self._handle, row).contents)
        view = self._views.get(address)
        if view is None:
            memory = (ctypes.c_float * self._n_vocab).from_address(address)
            view = self._views[address] = np.ctypeslib.as_array(memory)
        return view


class Logprobs:
    """Log-probabilities as the model means them: log-softmax of the logits before bias, hooks and sampling."""

    def __init__(self, model: Model, rows: Rows, top: int) -> None:
        self._model = model
        self._rows = rows
        self._top = min(top, model.n_vocab)
        self._now: NDArray[np.float32] = np.empty(0, np.float32)
        self._pieces: dict[int, bytes] = {}

    def look(self, row: int) -> None:
        """Take the probabilities of row ``row``, before anything touches it."""
        logits = self._rows[row]
        shifted = logits - logits.max()
        self._now = shifted - np.log(np.exp(shifted).sum())

    def of(self, token: int) -> TokenLogprob:
        """The figures of ``token``, drawn from the row that was looked at."""
        now = self._now
        best = np.argpartition(now, -self._top)[-self._top :] if self._top else np.empty(0, np.intp)
        best = best[np.argsort(-now[best], kind="stable")]
        top = tuple(Candidate(int(each), self._piece(int(each)), float(now[each])) for each in best)
        return TokenLogprob(token, self._piece(token), float(now[token]), top)

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._model.named_piece(token)
        return self._pieces[token]
