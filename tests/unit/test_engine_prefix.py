from __future__ import annotations

import pytest

from runtime.engine.prefix import ROW_GROUP, TILE_ROWS, Checkpoint, Checkpoints, common_prefix, resumable


@pytest.mark.parametrize("block", [1, 7, 32, 64, 100, 512])
def test_what_is_computed_again_is_cut_into_micro_batches_of_a_cold_run_s_kind(block: int) -> None:
    for length in [*range(1, 140), 511, 512, 513, 575, 576, 1000, 1025]:
        for shared in {0, 1, length // 3, length // 2, length - 2, length - 1, length, length + 5}:
            kept = resumable(max(0, shared), length, block)
            start = kept // block * block
            cold = min(start + block, length) - start
            warm = min(start + block, length) - kept
            assert 0 <= kept <= min(max(0, shared), length - 1)
            assert warm == cold or (kept - start) % ROW_GROUP == 0
            assert (warm >= TILE_ROWS) == (cold >= TILE_ROWS)
            assert (warm == 1) == (cold == 1)


def test_no_more_is_computed_again_than_that_takes() -> None:
    assert resumable(931, 1000, 512) == 928  # 72 rows, a multiple of 4 into the micro-batch at 512
    assert resumable(999, 1000, 512) == 936  # 64 rows
    assert resumable(600, 1000, 512) == 600
    assert resumable(512, 1000, 512) == 512
    assert resumable(512, 513, 512) == 512  # a cold run computes that one alone too
    assert resumable(539, 540, 512) == 536


def test_common_prefix_ends_at_the_first_difference() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


def test_nearest_checkpoint_before_a_place_is_found() -> None:
    checkpoints = Checkpoints()
    for tokens in (10, 30, 20):
        checkpoints.add(Checkpoint(tokens=tokens, state=b"x"))
    found = checkpoints.before(25)
    assert found is not None
    assert found.tokens == 20
    assert checkpoints.before(9) is None
    checkpoints.cut(15)
    assert [kept.tokens for kept in checkpoints] == [10]


def test_checkpoints_stay_within_their_memory() -> None:
    checkpoints = Checkpoints(limit_bytes=10)
    for tokens in (1, 2, 3):
        checkpoints.add(Checkpoint(tokens=tokens, state=bytes(4)))
    assert [kept.tokens for kept in checkpoints] == [2, 3]
    checkpoints.add(Checkpoint(tokens=3, state=bytes(5)))
    assert [len(kept.state) for kept in checkpoints] == [4, 5]
    checkpoints.add(Checkpoint(tokens=4, state=bytes(11)))
    assert list(checkpoints) == []
