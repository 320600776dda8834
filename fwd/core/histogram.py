"""How long something takes, as counts of spans: what a percentile is read from later."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Spans in seconds, counted by the least of `bounds` that is not below them; the last count has no bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total_s = 0.0

    def note(self, span_s: float) -> None:
        """Count a span."""
        self.counts[bisect_left(self.bounds, span_s)] += 1
        self.total_s += span_s
