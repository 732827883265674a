"""Several runs of one thing: the median, how far the runs lie apart, and how two medians compare."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Runs in the order they were made, in whatever unit they have."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def noise(self) -> float | None:
        """Distance of the quartiles (inclusive method) over the median; None of fewer than three runs."""
        if len(self.runs) < 3 or not self.median:
            return None
        first, _, third = statistics.quantiles(self.runs, n=4, method="inclusive")
        return (third - first) / abs(self.median)

    def as_json(self) -> dict[str, object]:
        """``{median, min, max, noise, runs}``."""
        noise = self.noise
        return {
            "median": rounded(self.median),
            "min": rounded(min(self.runs)),
            "max": rounded(max(self.runs)),
            "noise": None if noise is None else round(noise, 4),
            "runs": [rounded(run) for run in self.runs],
        }


def summarize(runs: Sequence[float]) -> Summary:
    return Summary(runs=tuple(runs))


def ratio(ours: Summary, other: Summary) -> float | None:
    """Our median over the other's; None where the other's is 0."""
    return ours.median / other.median if other.median else None


def rounded(value: float) -> float:
    """Five significant figures: more than any run repeats."""
    return float(f"{value:.5g}")
