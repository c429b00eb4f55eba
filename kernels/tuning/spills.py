"""A configuration for which the compiler spills no registers, found without timing anything.

How many a tile takes depends on the target, the version of triton and the flags: a soft cap, dropout, a bias. What is
first elsewhere may spill hundreds here, each of which is stored and loaded in every step of a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.cost import Rates, predict
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.estimate import estimated, wanted_registers
from attnrewrite.kernels.tuning.work import Shape

_TRIES = 8
_FEW = 32
_LESS, _MUCH_LESS = 0.98, 0.75
"""Of the registers that the last one wanted, after few spills and after many."""


def spilling_least(
    kernel: str,
    first: Config,
    shape: Shape,
    uses: Callable[[Config], Resources | None],
    device: Device,
    rates: Rates,
) -> Config:
    """Return ``first`` if the compiler spills nothing, else the fastest one, as predicted, that wants fewer registers.

    Args:
        kernel: its name in ``kernels/dense/catalogue.py``.
        first: what is tried first.
        shape: the call.
        uses: compiles; None for what cannot be had.
        device: where it would run, for the cost model.
        rates: what kernels reach there.

    It goes on to fewer and fewer registers until nothing spills or eight were compiled: then the one that spills least.
    """
    found: dict[Config, int] = {}
    config: Config | None = first
    for _ in range(_TRIES):
        if config is None:
            break
        used = uses(config)
        if used is not None and used.shared <= device.shared_block:
            found[config] = used.spills
            if not used.spills:
                return config
        few = min(found.values(), default=math.inf) <= _FEW
        most = (_LESS if few else _MUCH_LESS) * wanted_registers(kernel, config, shape)
        config = _fastest(kernel, first, shape, device, rates, most)
    return min(found, key=lambda config: found[config], default=first)


def _fastest(kernel: str, first: Config, shape: Shape, device: Device, rates: Rates, most: float) -> Config | None:
    """Return the configuration that is expected to be fastest among those that want no more registers than ``most``.

    Where some are alike to the model, it is the one with the largest tile, and three stages, or nearly.
    """
    ranked = [
        (predict(kernel, config, shape, estimated(kernel, config, shape), device, rates), *_usual(config), config)
        for config in replace(SPACES[kernel], descriptors=(first.descriptors,))
        if wanted_registers(kernel, config, shape) <= most
    ]
    seconds, *_, config = min(ranked, default=(math.inf, 0, 0, first))
    return config if seconds < math.inf else None


def _usual(config: Config) -> tuple[int, int]:
    return -config.block_m * config.block_n, abs(config.stages - 3)
