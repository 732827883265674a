from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from toolchain.lora.data.split import Span, content_key, cut_points, held_keys, split_text


def keys(count: int) -> list[bytes]:
    return [content_key([{"role": "user", "content": f"question {number}"}]) for number in range(count)]


def paragraphs(count: int) -> bytes:
    return "\n\n".join(f"Paragraph {n} of some length, with words in it.\nAnd a line." for n in range(count)).encode()


def joined(data: bytes, spans: Sequence[Span]) -> bytes:
    return b"".join(data[start:end] for start, end in spans)


def test_conversations_that_differ_in_white_space_alone_are_the_same_example() -> None:
    one = content_key([{"role": "user", "content": " Hi  there\n"}])
    assert one == content_key([{"role": "user", "content": "Hi there"}])
    assert one != content_key([{"role": "system", "content": "Hi there"}])
    assert one != content_key([{"role": "user", "content": "Hi"}, {"role": "user", "content": "there"}])


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.1, 10), (100, 0.001, 1), (2, 0.9, 1), (1, 0.5, 0)])
def test_the_share_is_kept_of_the_different_examples_at_least_one_and_never_all(
    count: int, share: float, held: int
) -> None:
    assert len(held_keys(keys(count) * 3, share, seed=1)) == held


def test_nothing_is_kept_of_a_share_of_zero() -> None:
    assert not held_keys(keys(10), 0.0, seed=1)
    assert split_text(b"some text", 0.0, seed=1) == ([(0, 9)], [])


def test_what_is_kept_depends_on_seed_and_content_and_not_on_the_order() -> None:
    found = held_keys(keys(100), 0.2, seed=1)
    assert found == held_keys(keys(100)[::-1], 0.2, seed=1)
    assert found != held_keys(keys(100), 0.2, seed=2)
    assert len(found - held_keys(keys(101), 0.2, seed=1)) <= 1
    assert held_keys(keys(100), 0.2, seed=-(10**80)) == held_keys(keys(100), 0.2, seed=-(10**80))


@pytest.mark.parametrize(
    "data", [paragraphs(40), paragraphs(40_000), b"word " * 2_000_000, b"x" * 1_000_000, "\u20ac".encode() * 100_000]
)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_text_is_parted_whole_without_overlap_and_by_the_share(data: bytes, share: float) -> None:
    learned, held = split_text(data, share, seed=3)
    spans = sorted([*learned, *held])
    assert [span[0] for span in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(data)
    assert len(joined(data, held)) == pytest.approx(share * len(data), rel=0.3)
    for start, end in spans:
        data[start:end].decode()  # no character is cut


def test_pieces_of_a_text_are_whole_paragraphs_from_all_over_it() -> None:
    data = paragraphs(40_000)
    learned, held = split_text(data, 0.1, seed=3)
    assert all(data[start:end].startswith(b"Paragraph") for start, end in [*learned, *held])
    eighth = len(data) / 8
    assert [int(start / eighth) for start, _ in held] == list(range(8))
    assert (learned, held) == split_text(data, 0.1, seed=3)
    assert held != split_text(data, 0.1, seed=4)[1]


@pytest.mark.parametrize("seed", range(30))
def test_parts_of_a_text_are_bounded_and_together_the_text(seed: int) -> None:
    random.seed(seed)
    words = random.choices(["word", " ", "\n", "  \n\n  ", "\u20ac\u20ac", "=-", "x" * 90], k=800)
    data = "".join(words).encode()
    places = [0, *cut_points(data, (0, len(data)), 100), len(data)]
    assert places == sorted(set(places))
    parts = [data[start:end] for start, end in itertools.pairwise(places)]
    assert max(map(len, parts)) <= 100
    assert "".join(part.decode() for part in parts) == "".join(words)


def test_a_text_is_cut_behind_lone_line_breaks_and_before_lone_spaces() -> None:
    lines = b"one line\n    indented\n\nparagraph\n" * 50
    for at in cut_points(lines, (0, len(lines)), 200):
        assert lines[at - 1 : at] == b"\n"
        assert not lines[at - 2 : at - 1].isspace()
        assert not lines[at : at + 1].isspace()
    words = b"some words = and signs  twice " * 50
    for at in cut_points(words, (0, len(words)), 200):
        assert words[at - 1 : at].isalpha()
        assert words[at : at + 1] == b" "
        assert words[at + 1 : at + 2].isalpha()
