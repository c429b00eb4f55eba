"""How many queries of selective attention go at once: their penalty must fit, and they should fill the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.keys import shape_of_call

if TYPE_CHECKING:
    from attnrewrite.kernels.tuning.device import Device

LARGEST_PENALTY = 1 << 29
"""Bytes that the penalty of a strip may take, on devices with at least 32 times as much memory."""
STEP = 128
"""Rows of the largest tile."""


def strips_of(call: Call) -> Iterator[slice]:
    """Yield the rows of each strip, from the first to the last."""
    L = call.sizes[3]
    height = rows_at_once(call, _allowed(call.query.device), _device(call.query.device))
    yield from (slice(start, min(L, start + height)) for start in range(0, max(1, L), height))


def rows_at_once(call: Call, limit: int, device: Device | None) -> int:
    """Return the rows of a strip whose penalty takes up to ``limit`` bytes; without a device, as many as may be."""
    B, _, _, L, S = call.sizes
    most = max(1, limit // (call.query.element_size() * max(1, B * S) * STEP)) * STEP
    if device is None or most >= L:
        return most
    from attnrewrite.kernels.tuning.cost import Rates
    from attnrewrite.kernels.tuning.heights import best_height
    from attnrewrite.kernels.tuning.published import RATES

    return best_height(shape_of_call(call), most, STEP, device, RATES.get(device.name, Rates()))


def _allowed(device: torch.device) -> int:
    if device.type != "cuda":
        return LARGEST_PENALTY
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return min(LARGEST_PENALTY, memory // 32)


@functools.cache
def _device(device: torch.device) -> Device | None:
    """Return what the cost model knows of a device, None for triton's interpreter and for one that it does not know."""
    from attnrewrite.kernels.tuning.device import present

    try:
        return present(device.index) if device.type == "cuda" else None
    except ValueError:
        return None
