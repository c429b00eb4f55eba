"""Time of work on a GPU, between two events, with a cold cache and without the gaps of launching."""

from __future__ import annotations

from collections.abc import Callable

import torch

_FLUSHED = 1 << 28
"""Bytes, several times a level-two cache."""
_AHEAD = 8_000_000
"""Cycles that the device sleeps, about 4 ms, while everything that is to be timed is put into its queue."""
SHORT = 50e-6
"""Seconds up to which work is replayed from a CUDA graph, which leaves less between the two events."""


class CudaClock:
    """Runs something on the current device and returns the seconds that the device worked on it."""

    def __init__(self) -> None:
        self.cache = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types here

    def __call__(self, run: Callable[[], object]) -> float:
        """Take the time."""
        self.cache.zero_()
        torch.cuda._sleep(_AHEAD)  # type: ignore[no-untyped-call]  # torch has no types here
        self.start.record()
        run()
        self.end.record()
        torch.cuda.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """Return what replays ``run``, which has run before, from a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
