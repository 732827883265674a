"""The context meter: a pure function of two numbers."""

from __future__ import annotations

import pytest

from runtime.chat.meter import Level, meter


@pytest.mark.parametrize(
    ("used", "bars"),
    [(0, "▯▯▯▯▯▯▯▯"), (1, "▮▯▯▯▯▯▯▯"), (512, "▮▯▯▯▯▯▯▯"), (513, "▮▮▯▯▯▯▯▯"), (4096, "▮▮▮▮▮▮▮▮"), (9999, "▮▮▮▮▮▮▮▮")],
)
def test_bars_show_every_eighth_that_is_begun_and_never_more_than_all(used: int, bars: str) -> None:
    assert meter(used, 4096).text == f"ctx {bars} {used:,}/4,096"


@pytest.mark.parametrize(
    ("used", "level"), [(0, "calm"), (500, "calm"), (501, "filling"), (850, "filling"), (851, "full")]
)
def test_level_rises_with_the_share(used: int, level: Level) -> None:
    assert meter(used, 1000).level == level


@pytest.mark.parametrize(
    ("used", "n_ctx", "text"),
    [(1204, None, "ctx 1,204 tokens"), (None, 4096, "ctx 4,096 tokens"), (None, None, ""), (7, 0, "ctx 7 tokens")],
)
def test_what_nobody_tells_is_left_out(used: int | None, n_ctx: int | None, text: str) -> None:
    assert (meter(used, n_ctx).text, meter(used, n_ctx).level) == (text, "calm")
