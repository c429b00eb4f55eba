"""What kernels reach on a device, as a record: fitted to what was timed there, and shared like other records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attnrewrite.kernels.store.key import Key, Pairs, pairs
from attnrewrite.kernels.store.record import Record, Timing
from attnrewrite.kernels.store.tiers import Store
from attnrewrite.kernels.tuning.calibration import LIMITS, Point, fit, misfit
from attnrewrite.kernels.tuning.cost import Rates
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.published import RATES

FAMILY = "rates"
FEWEST = 8
"""Points that are needed for a fit."""


class RatesSpace:
    """Rates as text, each within its limits."""

    def valid(self, config: Mapping[str, Any]) -> bool:
        """Whether these are rates."""
        if config.keys() != set(Rates._fields):
            return False
        given = {name: float(value) for name, value in config.items()}
        return all(low <= given[name] <= high for name, (low, high) in LIMITS.items())


SPACE = RatesSpace()


def key_like(key: Key) -> Key:
    """Return the key of the rates of a kernel's device."""
    return replace(
        key, family=FAMILY, kernel=key.family, source="", dtypes=(), dims=(), flags=(), bucket=(), deterministic=True
    )


def rates_of(device: Device, key: Key, store: Store) -> Rates:
    """Return what was fitted on the device of ``key`` to most times, else to published times, else what is usual."""
    known = store.timings(key_like(key), SPACE).values()
    if not known:
        return RATES.get(device.name, Rates())
    best = max(known, key=lambda timing: timing.n)
    return Rates(**{name: float(value) for name, value in dict(best.config).items()})


def fitted(points: Sequence[Point], device: Device, key: Key, now: float) -> Record | None:
    """Return the record of the rates that fit these times best; None for too few of them."""
    if len(points) < FEWEST:
        return None
    rates = fit(points, device)
    error = misfit(points, device, rates)
    config = as_config(rates)
    timing = Timing(config, "ok", error, error, error, len(points))
    return Record(key_like(key), (timing,), config, round(error, 4), 1, int(now))


def as_config(rates: Rates) -> Pairs:
    """Return rates as text, of which records can hold them."""
    return pairs({name: f"{value:g}" for name, value in rates._asdict().items()})
