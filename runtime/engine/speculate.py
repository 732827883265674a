"""Prompt-lookup speculation: guess what follows from where the text has stood before, check it in one batch.

A draft is what followed the last earlier place with the same ending (Saxena 2023, "Prompt lookup decoding"). Its
tokens are decoded together with the one that was drawn, and each is kept while the sampler draws just that one:
what is drawn, and with which random numbers, is what it would be without.

But the arithmetic of several rows is not bit for bit that of one (as in llama.cpp's own speculation): on CPU logits
moved by up to 0.08 (measured on the demo model), so that a close choice may fall the other way. And whether a draft
is made depends on measured times. Who needs the same text from the same seed leaves it off; that is the default.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any, Final

from runtime.engine.context import Context
from runtime.engine.model import Model
from runtime.settings import OUTPUT_ROWS

_TOKEN_BITS: Final = 24  # no vocabulary has 16 million tokens
_TWO_TOKENS: Final = (1 << 2 * _TOKEN_BITS) - 1
_DRAFTS: Final = (15, 7, 3, 1)  # few sizes: each has its graph, and its cost is learned
_INTEREST: Final = 0.003
_START: Final = 0.5
_MOST: Final = 8.0
_NEW: Final = 0.2  # weight of the newest measurement
_FADING: Final = 0.98
_WORST: Final = 1.5  # decodes for each row at most: a batch that took longer shared the machine with something


class Matcher:
    """The text so far, and the earlier place in it that its end repeats.

    It is found by the last three tokens, or else by two (one would find too much that is not repeated), and followed
    as long as the text does.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.matched = 0
        self._tokens: list[int] = []
        self._after_two: dict[int, int] = {}
        self._after_three: dict[int, int] = {}
        self._two = 0  # the last two tokens in one number, which costs less than a tuple
        self._at: int | None = None
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Go on by one token; ``matched`` then tells how many tokens agree with the earlier place, 0 for none."""
        tokens, at = self._tokens, self._at
        if at is not None and tokens[at] == token:
            at += 1
            self.matched += 1
        else:
            at = None
        tokens.append(token)
        size = len(tokens)
        three = self._two << _TOKEN_BITS | token
        self._two = two = three & _TWO_TOKENS
        if at is None:
            at, self.matched = self._after_three.get(three), 3
            if at is None:
                at, self.matched = self._after_two.get(two), 2
                if at is None:
                    self.matched = 0
        if size > 1:
            self._after_two[two] = size
        if size > 2:
            self._after_three[three] = size
        self._at = at

    def draft(self, count: int) -> list[int]:
        """``count`` tokens that followed there; a repetition that reaches the end goes round."""
        if self._at is None:
            return []
        found = self._tokens[self._at : self._at + count]
        period = len(found)
        while len(found) < count:
            found.append(found[-period])
        return found


class Purse:
    """Whether drafts pay, in units of one single decode: they are bought on credit that they have to earn.

    A batch that brings more tokens than it costs single decodes fills the purse, one that brings fewer empties it,
    and a draft is made only when the purse covers what it may lose. Text that repeats nothing can so lose about
    one decode and 0.3 percent, which pay for a new try from time to time.
    """

    def __init__(self) -> None:
        self.balance = _START
        self._single = 0.0
        self._costs: dict[int, float] = {}
        self._unsettled = True

    def single(self, seconds: float) -> None:
        """A decode of one token took so long. The first one after a batch pays for the change of graphs."""
        if self._unsettled:
            self._unsettled = False
            if self._single:
                self.balance -= max(0.0, min(1.0, seconds / self._single - 1))
            return
        self._single += (seconds - self._single) * (_NEW if self._single else 1)
        if self.balance < _START:
            self.balance += _INTEREST

    def batch(self, drafted: int, accepted: int, seconds: float) -> None:
        """A batch of one token and a draft took so long, and so many of the draft were right."""
        self._unsettled = True
        cost = min(seconds / self._single, _WORST * (1 + drafted))
        self.balance = max(-_MOST, min(_MOST, self.balance + 1 + accepted - cost))
        if drafted in self._costs:
            self._costs[drafted] += (cost - self._costs[drafted]) * _NEW
        else:  # the first batch of a size allocates: the next one tells
            self._costs[drafted] = _guessed_cost(drafted)

    def affords(self, drafted: int, matched: int) -> bool:
        """Whether the loss of such a draft, likely as it is after so long a match, is covered.

        Never before a single decode was timed. A size that costs more than it can bring is left out until the figure
        has faded: it may have been measured while something else ran.
        """
        if not self._single:
            return False
        cost = self._costs.get(drafted, _guessed_cost(drafted))
        if cost >= 1 + drafted:
            self._costs[drafted] = cost * _FADING
            return False
        return (cost - 1) / (1 + matched - drafted) <= self.balance


def _guessed_cost(drafted: int) -> float:
    """Single decodes that a batch costs, before any was timed: between a large model's (1) and a tiny one's."""
    return 1 + 0.5 * drafted


class LookupSteps:
    """Decodes a drawn token together with a draft, and goes on without decoding while the draft comes true."""

    def __init__(self, context: Context, prompt: Sequence[int], limit: int) -> None:
        lib = context.model.lib
        self.row = -1
        self.drafted = self.accepted = 0
        self._context = context
        self._handle = context.handle
        self._llama_decode, self._synchronize = lib.llama_decode, lib.llama_synchronize
        self._tokens = (ctypes.c_int32 * OUTPUT_ROWS)()
        self._single = lib.llama_batch_get_one(self._tokens, 1)
        self._several = lib.llama_batch_get_one(self._tokens, 1)
        self._several.logits = (ctypes.c_int8 * OUTPUT_ROWS)(*([1] * OUTPUT_ROWS))
        self._left = limit
        self._matcher = Matcher(prompt)
        self._purse = Purse()
        self._draft: list[int] = []
        self._right = 0  # tokens of the draft that were drawn
        self._seconds = 0.0

    def advance(self, token: int) -> int:
        """Go on behind ``token``: in the rows that are there already, or by a decode."""
        self._left -= 1
        matcher = self._matcher
        matcher.add(token)
        draft = self._draft
        if draft:
            if self._right < len(draft) and draft[self._right] == token:
                self.row = self._right = self._right + 1
                self._context.cached.append(token)
                return 0
            self._settle()
        length = self._length() if matcher.matched else 0
        self._tokens[0] = token
        if length:
            status = self._decode_draft(matcher.draft(length))
        else:
            self.row = -1
            status = self._decode(self._single)
            self._purse.single(self._seconds)
        if not status:
            self._context.cached.append(token)
        return status

    def finish(self) -> None:
        """Take back what was guessed wrong."""
        if self._draft:
            self._settle()

    def _settle(self) -> None:
        """The draft is over: forget its rest, and book what it brought."""
        if self._right < len(self._draft):
            self._context.keep(len(self._context.cached))
        self._purse.batch(len(self._draft), self._right, self._seconds)
        self.drafted += len(self._draft)
        self.accepted += self._right
        self._draft, self._right = [], 0

    def _length(self) -> int:
        """Of a draft no longer than the match is sure, the purse covers, and the context and the limit have room."""
        context = self._context
        room = min(self._left - 1, context.n_ctx - len(context.cached) - 1, context.n_batch - 1)
        matched = self._matcher.matched
        most = min(matched, room)
        for length in _DRAFTS:
            if length <= most and self._purse.affords(length, matched):
                return length
        return 0

    def _decode_draft(self, draft: list[int]) -> int:
        """Decode the token and the draft, with the logits behind each."""
        rows = 1 + len(draft)
        self._tokens[1:rows] = [*draft]
        self._several.n_tokens = rows
        self.row = 0
        status = self._decode(self._several)
        if not status:
            self._draft = draft
        return status

    def _decode(self, batch: Any) -> int:
        started = time.perf_counter()
        status: int = self._llama_decode(self._handle, batch)
        self._synchronize(self._handle)
        self._seconds = time.perf_counter() - started
        return status


def can_speculate(model: Model) -> bool:
    """Whether the model's cache can take back its last tokens: a recurrent one and a sliding window cannot."""
    lib, handle = model.lib, model.handle
    recurrent = lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle)
    return not recurrent and lib.llama_model_n_swa(handle) == 0
