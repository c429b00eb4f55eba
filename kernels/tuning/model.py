"""The configuration that the cost model prefers, where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.keys import shape_of
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.tuning.cost import Rates, predict
from attnrewrite.kernels.tuning.device import H200, Device, present
from attnrewrite.kernels.tuning.estimate import estimated
from attnrewrite.kernels.tuning.rates import rates_of
from attnrewrite.kernels.tuning.spills import spilling_least
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
    """Return the first configuration, or one of smaller tiles: where the compiler spills, or the device idles.

    It is compiled, as it will be anyway; others only where it spills.
    """
    first, shape = configs(launch.name, launch.widest, launch.bits)[0], shape_of(launch)
    try:
        device = present(launch.call.query.device.index)
    except ValueError:  # a generation without numbers: those of another one put tiles in much the same order
        return spilling_least(launch.name, first, shape, launch.uses, H200, Rates())
    rates = rates_of(device, key, store)
    begin = smaller(launch.name, first, shape, device, rates)
    return spilling_least(launch.name, begin, shape, launch.uses, device, rates)


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
