"""What is kept back for the evaluation: decided by content and seed, so that nothing of it is learned."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

from toolchain.base.chat_template import Message

Span: TypeAlias = tuple[int, int]

_PIECES: Final = 8
_PIECE_BYTES: Final = 16 << 10
"""Pieces are not shorter, where there is more than one: windows of some thousand tokens fit in."""
_BORDER_BYTES: Final = 2048
"""How far a cut moves to find the end of a paragraph, a line or a word."""


def content_key(messages: Iterable[Message]) -> bytes:
    """16 bytes that conversations share which say the same, whatever their white space."""
    said = [[message["role"], " ".join(message["content"].split())] for message in messages]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()


def held_keys(keys: Iterable[bytes], share: float, seed: int) -> frozenset[bytes]:
    """Those of ``keys`` that are kept back: ``share`` of the different ones, at least one and not all.

    They are the first by a keyed hash, so that the order of a file does not count and a line added to it changes
    little. Of a single key, none is kept.
    """
    different = set(keys)
    count = min(max(1, round(share * len(different))), len(different) - 1) if share else 0
    salt = str(seed).encode()[-64:]
    ranked = sorted(different, key=lambda key: hashlib.blake2b(key, key=salt, digest_size=16).digest())
    return frozenset(ranked[:count])


def split_text(data: bytes, share: float, seed: int) -> tuple[list[Span], list[Span]]:
    """(learned, kept) spans of a text, in order, that do not overlap; ``share`` of the bytes are kept.

    They are whole pieces, up to eight, one somewhere in each equal part of the text: what is said in one place is
    rarely said again in another, and neighbouring windows share their subject.
    """
    if not share or not data:
        return ([(0, len(data))] if data else []), []
    places = random.Random(seed)
    pieces = max(1, min(_PIECES, int(len(data) * share) // _PIECE_BYTES))
    part, size = len(data) / pieces, len(data) * share / pieces
    near = min(_BORDER_BYTES, int(size) // 4)
    held: list[Span] = []
    for number in range(pieces):
        start = int(number * part + places.random() * (part - size))
        span = _border(data, start, near), _border(data, int(start + size), near)
        if held and span[0] < held[-1][1]:
            span = held[-1][1], span[1]
        if span[0] < span[1]:
            held.append(span)
    learned, at = [], 0
    for start, end in [*held, (len(data), len(data))]:
        if at < start:
            learned.append((at, start))
        at = end
    return learned, held


def cut_points(data: bytes, span: Span, size: int) -> Sequence[int]:
    """Places to cut ``data[span]`` into parts of at most ``size`` bytes, where no tokenizer has a token across.

    Behind a lone line break, else before a lone space between letters: longer runs of white space are split by what
    follows them, and beside signs some vocabularies have a space in one token with them. In a text without such places,
    before any lone space or between two characters.
    """
    start, end = span
    found = []
    while end - start > size:
        latest = start + size
        if line := _last(b"\n", data, start + size // 2, latest, _is_black):
            start = line + 1
        else:
            words = _last(b" ", data, start, latest, _is_letter) or _last(b" ", data, start, latest, _is_black)
            start = words or _character(data, latest)
        found.append(start)
    return found


def _border(data: bytes, at: int, near: int) -> int:
    """The first beginning of a paragraph, line or word within ``near`` bytes from ``at`` on, else of a character."""
    for mark in (b"\n\n", b"\n", b" "):
        if (found := data.find(mark, at, at + near)) >= 0:
            return found + len(mark)
    return _character(data, at)


def _last(space: bytes, data: bytes, start: int, end: int, beside: Callable[[bytes], bool]) -> int:
    """The last place of a ``space`` whose neighbours are both such bytes; 0 without one."""
    at = end - 1
    while (at := data.rfind(space, start + 1, at)) >= 0:
        if beside(data[at - 1 : at]) and beside(data[at + 1 : at + 2]):
            return at
    return 0


def _is_black(byte: bytes) -> bool:
    return not byte.isspace()


def _is_letter(byte: bytes) -> bool:
    return byte.isalpha() or byte >= b"\x80"


def _character(data: bytes, at: int) -> int:
    while at > 0 and at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at
