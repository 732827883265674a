from __future__ import annotations

import itertools

import numpy as np
import pytest

from toolchain.lora.data.pack import Examples
from toolchain.lora.dataset_file import IGNORED, Rows

PAD = 7


def found_in(rows: Rows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of every example in the rows, the unused ends left out: where positions begin anew."""
    found = []
    for ids, labels, positions in zip(rows.ids, rows.labels, rows.positions, strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            if (labels[start:end] != IGNORED).any():
                found.append((tuple(ids[start:end].tolist()), tuple(labels[start:end].tolist())))
            else:
                assert set(ids[start:end].tolist()) == {PAD}
    return sorted(found)


def random_examples(n_ctx: int, count: int, seed: int = 0) -> tuple[Examples, list[tuple[list[int], bytes]]]:
    numbers = np.random.default_rng(seed)
    given = []
    for _ in range(count):
        length = int(numbers.integers(2, n_ctx + 1))
        learned = numbers.integers(0, 2, length).astype(np.uint8)
        learned[-1] = 1
        given.append((numbers.integers(100, 200, length).tolist(), learned.tobytes()))
    examples = Examples(n_ctx)
    for ids, learned in given:
        examples.add(ids, learned)
    return examples, given


def labels_of(ids: list[int], learned: bytes) -> tuple[int, ...]:
    """The first token is never learned."""
    return (IGNORED, *(token if counts else IGNORED for token, counts in list(zip(ids, learned, strict=True))[1:]))


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_stands_in_the_rows_once_and_whole(packing: bool) -> None:
    examples, given = random_examples(32, 300)
    rows = examples.rows(packing=packing, seed=1, padding=PAD)
    assert found_in(rows) == sorted((tuple(ids), labels_of(ids, learned)) for ids, learned in given)
    assert examples.tokens == sum(len(ids) for ids, _ in given)
    assert (examples.cut, examples.dropped, examples.longest) == (0, 0, max(len(ids) for ids, _ in given))


def test_packing_fills_the_rows_and_without_it_a_row_is_an_example() -> None:
    examples, _ = random_examples(64, 500)
    packed, alone = (examples.rows(packing=packing, seed=1) for packing in (True, False))
    assert len(alone.ids) == 500
    assert examples.tokens / packed.ids.size > 0.95


def test_an_example_that_repeats_is_there_as_often() -> None:
    examples = Examples(8)
    examples.add([11, 12, 13], b"\0\1\1", repeat=3)
    examples.add([21, 22], b"\0\1")
    assert examples.count == 4
    assert examples.tokens == 3 * 3 + 2
    rows = examples.rows(packing=True, seed=1, padding=PAD)
    assert [ids for ids, _ in found_in(rows)] == [(11, 12, 13)] * 3 + [(21, 22)]


def test_rows_are_decided_by_the_seed() -> None:
    examples, _ = random_examples(32, 200)
    for packing in (True, False):
        first, again, other = (examples.rows(packing=packing, seed=seed) for seed in (1, 1, -2))
        assert (first.ids == again.ids).all()
        assert first.ids.shape != other.ids.shape or (first.ids != other.ids).any()


def test_a_long_example_loses_its_end_and_one_without_anything_left_to_learn_is_dropped() -> None:
    examples = Examples(4)
    examples.add([1, 2, 3, 4, 5, 6], b"\0\0\1\0\1\1")
    assert (examples.cut, examples.dropped, examples.longest, len(examples)) == (1, 0, 6, 1)
    examples.add([1, 2, 3, 4, 5], b"\0\0\0\0\1", repeat=2, length=9)
    assert (examples.cut, examples.dropped, examples.longest, len(examples)) == (1, 2, 9, 1)
    examples.add([1, 2], b"\1\0")  # the first token has nothing before it
    assert (examples.cut, examples.dropped, len(examples)) == (1, 3, 1)
    rows = examples.rows(packing=True, seed=1, padding=PAD)
    assert rows.ids.tolist() == [[1, 2, 3, PAD]]
    assert rows.labels.tolist() == [[IGNORED, IGNORED, 3, IGNORED]]
    assert rows.positions.tolist() == [[0, 1, 2, 0]]


def test_an_example_whose_unlearned_end_alone_is_beyond_the_row_is_not_cut() -> None:
    examples = Examples(4)
    examples.add([1, 2, 3, 4, 5], b"\0\1\1\0\0")
    assert (examples.cut, examples.tokens) == (0, 3)


@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 1001])
def test_windows_of_a_text_are_the_text(count: int) -> None:
    text = np.arange(1000, 1000 + count, dtype=np.int32)
    examples = Examples(8)
    examples.add_windows(text)
    windows = found_in(examples.rows(packing=True, seed=1, padding=PAD))
    told = [token for ids, _ in windows for token in ids]
    assert told == text[: count - (count % 8 == 1)].tolist()  # a single token at the end has nothing before it
    assert all(labels == (IGNORED, *ids[1:]) for ids, labels in windows)
    assert (examples.cut, examples.dropped) == (0, 0)


def test_no_examples_make_no_rows() -> None:
    examples = Examples(8)
    examples.add_windows(np.array([5], np.int32))
    for packing in (True, False):
        rows = examples.rows(packing=packing, seed=1)
        assert rows.ids.shape == rows.labels.shape == rows.positions.shape == (0, 8)
    assert (examples.count, examples.tokens) == (0, 0)


def test_the_beginning_is_that_of_the_first_example_that_is_long_enough() -> None:
    examples = Examples(8)
    for ids in ([1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13]):
        examples.add(ids, b"\1" * len(ids))
    assert examples.beginning(4).tolist() == [3, 4, 5, 6]
    assert examples.beginning(32).tolist() == [8, 9, 10, 11, 12, 13]
