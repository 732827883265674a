"""How full the context is, in a few characters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Level: TypeAlias = Literal["calm", "filling", "full"]
"""``filling``: over half; ``full``: over 85 of 100, where the oldest turns are soon left out of the prompt, which
leaves a quarter of the context to the reply."""

BARS: Final = 8
FILLING: Final = 0.5
FULL: Final = 0.85


@dataclass(frozen=True, kw_only=True)
class Meter:
    """What is shown, and how urgent it is."""

    text: str
    level: Level


def meter(used: int | None, n_ctx: int | None) -> Meter:
    """``ctx ▮▮▮▯▯▯▯▯ 1,204/4,096``; without what is not known, and without text when nothing is."""
    if used is None or n_ctx is None or n_ctx <= 0:
        known = [f"{count:,}" for count in (used, n_ctx) if count is not None]
        return Meter(text=f"ctx {known[0]} tokens" if known else "", level="calm")
    share = max(0.0, min(used / n_ctx, 1.0))
    filled = min(BARS, -(-max(used, 0) * BARS // n_ctx))  # what is begun is shown
    level: Level = "calm" if share <= FILLING else "filling" if share <= FULL else "full"
    return Meter(text=f"ctx {'▮' * filled}{'▯' * (BARS - filled)} {used:,}/{n_ctx:,}", level=level)
