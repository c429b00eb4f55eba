"""The configuration that the cost model prefers, where nothing was measured and nothing is to be compiled first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.keys import shape_of
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.tuning.cost import Rates, predict
from attnrewrite.kernels.tuning.device import Device, present
from attnrewrite.kernels.tuning.estimate import estimated
from attnrewrite.kernels.tuning.rates import rates_of
from attnrewrite.kernels.tuning.work import WORK, Shape

if TYPE_CHECKING:
    from attnrewrite.kernels.dense.launch import Launch
    from attnrewrite.kernels.store.key import Key
    from attnrewrite.kernels.store.tiers import Store

_WORTH = 0.9
"""Of the time of the first configuration: the model's error is nearly as much."""
_WAVES = 2
"""Times the multiprocessors: with so many programs the first configuration fills the device."""


def preferred(launch: Launch, key: Key, store: Store) -> Config:
    """Return the first configuration, or one of smaller tiles where that is expected to be clearly faster."""
    first = configs(launch.name, launch.widest, launch.bits)[0]
    try:
        device = present(launch.call.query.device.index)
    except ValueError:  # a generation without numbers
        return first
    return smaller(launch.name, first, shape_of(launch), device, rates_of(device, key, store))


def smaller(kernel: str, first: Config, shape: Shape, device: Device, rates: Rates) -> Config:
    """Return ``first``, or with smaller tiles what fills the device better: few heads, short sequences.

    A smaller tile with as many warps needs fewer registers and less shared memory: it runs wherever ``first`` does.
    """
    if WORK[kernel](shape, first).programs >= _WAVES * device.sms:
        return first

    def seconds(config: Config) -> float:
        return predict(kernel, config, shape, estimated(kernel, config, shape), device, rates)

    best = min(_tiles(kernel, first), key=lambda config: (seconds(config), config != first, config))
    return best if seconds(best) < _WORTH * seconds(first) < math.inf else first


def _tiles(kernel: str, first: Config) -> Iterator[Config]:
    space = SPACES[kernel]
    yield from (c for c in space if c.block_m <= first.block_m and c.block_n <= first.block_n and c[2:] == first[2:])
