"""Fit what kernels reach on a device to times that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.cost import Rates, predict
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.work import Shape


class Point(NamedTuple):
    """A measured time of one kernel, in seconds."""

    kernel: str
    config: Config
    shape: Shape
    used: Resources
    seconds: float


_FITTED = ("matmul", "overlap", "tile", "program")
LIMITS = {"matmul": (0.3, 1.0), "overlap": (0.0, 1.0), "tile": (1e-9, 1e-6), "program": (1e-7, 2e-5)}
_STEPS = (1.3, 1.1, 1.03, 1.01)


def fit(points: Sequence[Point], device: Device, start: Rates | None = None) -> Rates:
    """Return the rates with the least mean square of log(predicted / measured), by a search along each rate in turn.

    Raises ValueError where no point can be predicted.
    """
    points = [p for p in points if math.isfinite(misfit([p], device, Rates()))]
    if not points:
        raise ValueError("none of the points fits on the device")
    best = start or Rates()
    error = misfit(points, device, best)
    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for name in _FITTED:
                low, high = LIMITS[name]
                for factor in (step, 1 / step):
                    value = min(high, max(low, max(getattr(best, name), low) * factor))
                    tried = best._replace(**{name: value})
                    found = misfit(points, device, tried)
                    if found < error * (1 - 1e-6):
                        best, error, moved = tried, found, True
    return Rates(*(float(f"{x:.3g}") for x in best))


def misfit(points: Sequence[Point], device: Device, rates: Rates) -> float:
    """Return the root mean square of log(predicted / measured): 0.1 is about 10 percent."""
    logs = [math.log(predict(p.kernel, p.config, p.shape, p.used, device, rates) / p.seconds) for p in points]
    return math.sqrt(math.fsum(x * x for x in logs) / len(logs))
