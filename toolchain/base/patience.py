"""What clients of HTTP servers share: how long a busy server asks to wait, and what an error came from."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator


def retry_after_s(stated: str) -> float | None:
    """Seconds in a Retry-After, which is a number or a date; None for anything else."""
    stated = stated.strip()
    if stated.isascii() and stated.replace(".", "", 1).isdigit():
        return float(stated[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(stated).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
