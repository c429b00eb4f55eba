"""Interleaved timing: in every round each case runs once, so that a busy moment falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Tick = Callable[[str, int, int], None]
"""Called with a label, the steps done and the steps in all."""
Clock = Callable[[Callable[[], object]], float]
"""Runs something and returns the seconds that it took."""
LEAST_ROUNDS = 3
"""That a median and its spread need."""


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
    enough: Callable[[], bool] = lambda: False,
    taken: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of every case in every round. The order turns by one place per round.

    ``enough`` may end it after a few rounds; ``taken`` is what is filled, so that an interrupted run leaves something.
    """
    taken = {} if taken is None else taken
    taken.update({name: [] for name in cases})
    names = list(cases)
    for turn in range(warmup + rounds):
        if turn >= warmup + LEAST_ROUNDS and enough():
            break
        tick(label, turn, warmup + rounds)
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            seconds = clock(cases[name])
            if turn >= warmup:
                taken[name].append(seconds)
    tick(label, warmup + rounds, warmup + rounds)
    return taken


def rounded(value: float) -> float:
    """Keep five significant digits."""
    return float(f"{value:.5g}")
