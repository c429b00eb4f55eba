"""Interleaved timing: in every round each case runs once, so that a busy moment falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Tick = Callable[[str, int, int], None]
"""Called with a label, the steps done and the steps in all."""


def interleave(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    tick: Tick,
    label: str,
    wait: Callable[[], object] = lambda: None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Return the seconds of every case in every round.

    The order turns by one place per round. ``wait`` comes before each reading of the clock, for a GPU.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(warmup + rounds):
        tick(label, turn, warmup + rounds)
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            wait()
            start = time.perf_counter()
            cases[name]()
            wait()
            if turn >= warmup:
                taken[name].append(time.perf_counter() - start)
    tick(label, warmup + rounds, warmup + rounds)
    return taken
