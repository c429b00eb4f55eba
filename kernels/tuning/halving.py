"""Successive halving: many candidates are timed a few times, the best of them more often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.winner import BAND, relative, settled


class Rung(NamedTuple):
    """So many of the candidates, each run so often."""

    candidates: int
    runs: int


Time = Callable[[Config], float | None]
"""One run: its seconds, or None where the candidate has failed."""


def halve(
    candidates: Sequence[Config],
    used: Mapping[Config, Resources],
    rungs: Sequence[Rung],
    most_runs: int,
    time: Time,
    in_time: Callable[[], bool],
    samples: dict[Config, list[float]],
) -> None:
    """Time candidates, one run of each after another, so that all meet the same state of the device.

    What may be as fast as the best stays in beyond a rung's number. The last ones are run until the choice among them
    no longer depends on noise, at most ``most_runs`` times. ``samples`` gets the seconds of every run, whenever it
    ends; of what has failed nothing.
    """
    alive = list(candidates)
    for rung in rungs:
        alive = _best(alive, samples, rung.candidates)
        alive = _round(alive, rung.runs, time, in_time, samples)
    alive = _best(alive, samples, 1)
    while len(alive) > 1 and in_time():
        if len(samples[alive[0]]) >= most_runs or settled({c: samples[c] for c in alive}, used):
            return
        alive = _round(alive, max(1, len(samples[alive[0]]) // 2), time, in_time, samples)


def _round(
    alive: list[Config], runs: int, time: Time, in_time: Callable[[], bool], samples: dict[Config, list[float]]
) -> list[Config]:
    for _ in range(runs):
        for config in list(alive):
            if not in_time():
                return alive
            seconds = time(config)
            if seconds is None:
                alive.remove(config)
                samples.pop(config, None)
            else:
                samples.setdefault(config, []).append(seconds)
    return alive


def _best(alive: list[Config], samples: Mapping[Config, Sequence[float]], count: int) -> list[Config]:
    """Return the fastest ones, and those that may be in the band; before all were timed, the first ones."""
    if not all(samples.get(config) for config in alive):
        return alive[:count]
    times = relative({config: samples[config] for config in alive})
    order = sorted(alive, key=times.__getitem__)
    return [c for place, c in enumerate(order) if place < count or times[c] <= times[order[0]] * (1 + 3 * BAND)]
