"""Quantiles of measured times."""

from __future__ import annotations

from collections.abc import Sequence


def quantile(samples: Sequence[float], part: float) -> float:
    """Return a quantile, with linear interpolation."""
    ordered = sorted(samples)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
