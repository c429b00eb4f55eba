"""The choice among configurations that are about equally fast: the same one from different noisy times."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources

BAND = 0.01
"""What is slower by up to about this part counts as equally fast."""
_PARTS = (0.05, 0.01, 0.002)
"""Of all runs, the fastest ones that tell how long a kernel takes."""
_FOLDS = 8
_RESAMPLED = 100


Samples = Mapping[Config, Sequence[float]]
"""Seconds of runs. Those of one place were run in one round, one after another."""


def winner(samples: Samples, used: Mapping[Config, Resources]) -> tuple[Config, float]:
    """Return the configuration to run, and the width of the band. All have as many runs.

    Of those in the band it is the one with the fewest spills, registers, bytes of shared memory, and the first in
    order. The edge of the band lies in the widest gap between ``BAND`` and twice that, so that noise moves nothing
    across it.
    """
    return _winner(relative(samples), used)


def settled(samples: Samples, used: Mapping[Config, Resources]) -> bool:
    """Whether other rounds would have told the same: the winner by halves of the rounds, drawn many times."""
    source = random.Random(0)  # statistics, no secret
    rounds = range(min(map(len, samples.values())))
    found, _ = winner(samples, used)
    for _ in range(_RESAMPLED):
        half = source.sample(rounds, -(-len(rounds) // 2))
        if winner({config: [runs[at] for at in half] for config, runs in samples.items()}, used)[0] != found:
            return False
    return True


def relative(samples: Samples) -> dict[Config, float]:
    """Return how long each takes beside the fastest, by the mean of its fastest runs.

    What disturbs a run makes it slower, so that the fastest ones vary least (Chen and Revels, arXiv 1608.04295); as all
    run in turns, each meets the device at its best. How many runs that are, is decided by what folds of the rounds
    differ in least: the fewer, the less noise, but a short moment, or noise that also makes runs faster, has its way.
    """
    return _relative(samples, min(_PARTS, key=lambda part: _spread(samples, part)))


def _relative(samples: Samples, part: float) -> dict[Config, float]:
    times = {config: _fastest(runs, part) for config, runs in samples.items()}
    best = min(times.values())
    return {config: time / best for config, time in times.items()}


def _fastest(runs: Sequence[float], part: float) -> float:
    return statistics.fmean(sorted(runs)[: max(1, round(part * len(runs)))])


def _spread(samples: Samples, part: float) -> float:
    """Return how much folds of the rounds differ."""
    count = min(_FOLDS, *map(len, samples.values()))
    folds = [_relative({config: runs[at::count] for config, runs in samples.items()}, part) for at in range(count)]
    return math.fsum(statistics.pvariance([fold[config] for fold in folds]) for config in samples)


def _winner(times: Mapping[Config, float], used: Mapping[Config, Resources]) -> tuple[Config, float]:
    best = min(times.values())
    edge = _edge(sorted(time / best - 1 for time in times.values()))
    equal = [config for config, time in times.items() if time / best - 1 <= edge]
    return min(equal, key=lambda config: (_uses(used[config]), config)), edge


def _edge(slower: Sequence[float]) -> float:
    """Return the middle of the widest gap between ``BAND`` and twice that, given how much slower each is."""
    inside = [BAND, *(apart for apart in slower if BAND < apart < 2 * BAND), 2 * BAND]
    low, high = max(pairwise(inside), key=lambda gap: gap[1] - gap[0])
    return (low + high) / 2


def _uses(used: Resources) -> tuple[int, int, int]:
    return used.spills, used.registers, used.shared
