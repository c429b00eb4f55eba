"""Time of work on a GPU, between two events, with a cold cache and without the gaps of launching."""

from __future__ import annotations

from collections.abc import Callable

import torch

_FLUSHED = 1 << 28
"""Bytes, several times a level-two cache."""
_AHEAD = 8_000_000
"""Cycles that the device sleeps, about 4 ms, while everything that is to be timed is put into its queue."""


class CudaClock:
    """Runs something on the current device and returns the seconds that the device worked on it."""

    def __init__(self) -> None:
        self.cache = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[], object]) -> float:
        """Take the time."""
        self.cache.zero_()
        torch.cuda._sleep(_AHEAD)
        self.start.record()
        run()
        self.end.record()
        torch.cuda.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3
