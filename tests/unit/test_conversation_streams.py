"""Streams cut anew: preserved sequences in one piece, reasoning apart from the answer, wherever the pieces end."""

from __future__ import annotations

import random
import re

import pytest

from runtime.conversation.preserved import PreservedSplitter
from runtime.conversation.reasoning import ReasoningSplitter
from toolchain.base.errors import UsageError


def cut(text: str, rng: random.Random) -> list[str]:
    """``text`` in random pieces, some of them empty."""
    ends = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def preserved(pieces: list[str], marker: str = "$$", limit: int = 1 << 16) -> list[str]:
    splitter = PreservedSplitter(marker, limit=limit)
    return [out for piece in pieces for out in splitter.feed(piece)] + splitter.flush()


def split(pieces: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside=inside)
    parts = [splitter.feed(piece) for piece in pieces] + [splitter.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


def test_a_preserved_sequence_comes_in_one_piece() -> None:
    assert preserved(list("a $$x^2$$ b")) == ["a", " ", "$$x^2$$", " ", "b"]
    assert preserved(["a $$x$$$$y$$ b"]) == ["a ", "$$x$$", "$$y$$", " b"]
    assert preserved(["<m>", "1<m", ">2"], "<m>") == ["<m>1<m>", "2"]


def test_text_outside_comes_at_once_but_for_half_a_marker() -> None:
    splitter = PreservedSplitter()
    assert splitter.feed("costs 5$") == ["costs 5"]
    assert splitter.feed(" or 6") == ["$ or 6"]
    assert splitter.feed("$") == []
    assert splitter.flush() == ["$"]


def test_an_unclosed_sequence_is_flushed_as_it_is() -> None:
    splitter = PreservedSplitter()
    assert splitter.feed("a$$b$") == ["a"]
    assert splitter.flush() == ["$$b$"]
    assert splitter.flush() == []
    assert splitter.feed("c$$d$$") == ["c", "$$d$$"]


def test_a_sequence_beyond_the_limit_streams() -> None:
    splitter = PreservedSplitter(limit=6)
    assert splitter.feed("$$1234") == []
    assert splitter.feed("5") == ["$$12345"]
    assert splitter.feed("6$") == ["6"]
    assert splitter.feed("$7") == ["$$", "7"]
    assert splitter.feed("$$a$$") == ["$$a$$"]


def test_random_streams_keep_every_character_and_every_sequence() -> None:
    rng = random.Random(11)
    for _ in range(1500):
        marker = rng.choice(["$$", "|", "aab", "<m>"])
        text = "".join(rng.choices([*"ab$|<m>", marker, marker], k=rng.randrange(16)))
        pieces = preserved(cut(text, rng), marker)
        assert "".join(pieces) == text
        assert all(pieces)
        mark = re.escape(marker)
        wholes = [match[0] for match in re.finditer(f"{mark}.*?{mark}", text, re.DOTALL)]
        assert [piece for piece in pieces if piece.startswith(marker) and len(piece) > len(marker)][
            : len(wholes)
        ] == wholes
        small = preserved(cut(text, rng), marker, limit=rng.randrange(6))
        assert "".join(small) == text


def test_a_long_stream_takes_no_time_in_square() -> None:
    splitter = PreservedSplitter()
    assert sum(len(out) for _ in range(40_000) for out in splitter.feed("$a")) == 80_000
    assert sum(len(out) for _ in range(40_000) for out in splitter.feed("$$a")) == 120_000
    assert len(preserved(["$$" * 400_001])) == 200_001
    reasoning, answer = split(["<think>a</think>\n"] * 10_000)
    assert (len(reasoning), answer) == (10_000, "")


def test_an_empty_marker_is_refused() -> None:
    with pytest.raises(UsageError):
        PreservedSplitter("")
    with pytest.raises(UsageError):
        ReasoningSplitter(close="")


def test_reasoning_is_kept_apart() -> None:
    assert split(["<think>\nhm\n</think>\n\n Answer\n"]) == ("\nhm\n", " Answer\n")
    assert split(["Hello <think>a</think>\r\nthere<think>b</think>!"]) == ("ab", "Hello there!")
    assert split(["no block </think> here"]) == ("", "no block </think> here")
    assert split(["<think>in <think> it</think>x"]) == ("in <think> it", "x")


def test_a_block_that_the_template_opened_is_reasoning() -> None:
    assert split(["hm</think>\nyes <think>x</think>"], inside=True) == ("hmx", "yes ")


def test_half_a_marker_at_the_end_is_text() -> None:
    assert split(["1 <thi"]) == ("", "1 <thi")
    assert split(["<think>hm</thin"]) == ("hm</thin", "")
    assert split(["<think>a</think>\n\n<th"]) == ("a", "<th")


def test_what_can_be_no_marker_comes_at_once() -> None:
    splitter = ReasoningSplitter()
    assert splitter.feed("1 <") == ("", "1 ")
    assert splitter.feed("2") == ("", "<2")
    assert splitter.feed("<think>a<") == ("a", "")
    assert splitter.inside
    assert splitter.feed("b") == ("<b", "")


def test_random_cuts_change_nothing() -> None:
    rng = random.Random(13)
    for _ in range(1500):
        text = "".join(
            rng.choices(["<think>", "</think>", "<", "think>", "\n", "\r\n", "a", " ", "</th"], k=rng.randrange(12))
        )
        inside = rng.random() < 0.3
        assert split(cut(text, rng), inside=inside) == split([text], inside=inside) == split(list(text), inside=inside)
        blocks = re.split("</think>(?:[\r\n]*)" if inside else "<think>", text, maxsplit=1)
        assert split([text], inside=inside)[0 if inside else 1].startswith(blocks[0])
