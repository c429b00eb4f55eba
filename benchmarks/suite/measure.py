"""Interleaved timing: in every round each case runs once, so that a busy moment falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Tick = Callable[[str, int, int], None]
"""Called with a label, the steps done and the steps in all."""
Clock = Callable[[Callable[[], object]], float]
"""Runs something and returns the seconds that it took."""


def wall(run: Callable[[], object]) -> float:
    """Take the time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def waiting(run: Callable[[], object]) -> float:
    """Take the time of a call until a GPU has done what it was told."""
    import torch

    def all_of_it() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return wall(all_of_it)


def interleave(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    tick: Tick,
    label: str,
    clock: Clock = wall,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Return the seconds of every case in every round. The order turns by one place per round."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(warmup + rounds):
        tick(label, turn, warmup + rounds)
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            seconds = clock(cases[name])
            if turn >= warmup:
                taken[name].append(seconds)
    tick(label, warmup + rounds, warmup + rounds)
    return taken
