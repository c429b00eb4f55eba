"""How many queries of selective attention should go at once, where the penalty of all would be too large."""

from __future__ import annotations

import functools
from dataclasses import replace

from attnrewrite.kernels.dense.configs import configs
from attnrewrite.kernels.tuning.cost import Rates, predict
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.estimate import estimated
from attnrewrite.kernels.tuning.work import Shape

_MORE_STRIPS = 8


@functools.lru_cache(maxsize=1024)
def best_height(shape: Shape, most: int, step: int, device: Device, rates: Rates) -> int:
    """Return the rows of a strip, a multiple of ``step`` up to ``most``, with which forward is expected to be fastest.

    In a short strip of a long sequence all programs take about as long, and the last wave of them may leave most of
    the device idle. So a few more strips than need be are looked at, too.
    """
    fewest = -(-shape.L // most)
    even = {-(-shape.L // (count * step)) * step for count in range(fewest, fewest + _MORE_STRIPS + 1)}
    heights = sorted({most, *(height for height in even if height <= most)}, reverse=True)
    return min(heights, key=lambda height: _seconds(shape, height, device, rates))


def _seconds(shape: Shape, height: int, device: Device, rates: Rates) -> float:
    config = configs("forward", shape.features // 2, shape.bits)[0]
    total = 0.0
    for start in range(0, shape.L, height):
        part = replace(shape, L=min(height, shape.L - start), offset=shape.offset + start)
        total += predict("forward", config, part, estimated("forward", config, part), device, rates)
    return total
