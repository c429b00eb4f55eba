"""Tensor descriptors: through them the TMA unit of a GPU fetches whole tiles, without a register for an address."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnrewrite.kernels.dense import keys

if TYPE_CHECKING:
    from attnrewrite.kernels.dense.launch import Launch

LOADED = {
    "forward": ("K", "V", "Penalty"),
    "backward_queries": ("K", "V", "Penalty"),
    "backward_keys": ("Q", "DOut", "Penalty"),
    "backward_values": ("Q", "DOut", "Penalty"),
}
"""The arguments that a kernel can load by descriptors."""
_FIRST = 90
_ALIGNED = 16
_LARGEST = 1 << 31


def can_describe(launch: Launch) -> bool:
    """Whether a launch may take a configuration with descriptors: the device has TMA, and all tensors are fit for it.

    Tiles always are: their sides have 16 to 256 elements of at least 2 bytes.
    """
    loaded = [launch.arguments.get(name) for name in LOADED.get(launch.name, ())]
    if not loaded:
        return False
    query = launch.call.query
    fit = not query.is_cuda or has_unit(keys.here(query.device.index).target)  # triton's interpreter has everything
    return fit and all(describable(tensor) for tensor in loaded if tensor is not None)


def has_unit(target: str) -> bool:
    """Whether chips of a target ("sm_90") have a TMA unit."""
    return target.startswith("sm_") and int(target[3:]) >= _FIRST


def describable(tensor: Tensor) -> bool:
    """Whether descriptors can describe the rows of ``[..., rows, features]``.

    Features lie side by side, rows apart, and every row begins at a multiple of 16 bytes: what
    ``cuTensorMapEncodeTiled`` of the CUDA driver asks for. Of descriptors made on the device nobody else checks it.
    """
    *outer, across = tensor.stride()
    starts = (tensor.data_ptr(), *(stride * tensor.element_size() for stride in outer))
    apart = min(outer) > 0 and outer[-1] >= tensor.shape[-1]
    return across == 1 and apart and max(tensor.shape) < _LARGEST and not any(start % _ALIGNED for start in starts)


def with_scratch(launch: Callable[[], object], device: torch.device) -> None:
    """Launch a kernel that makes descriptors, which lie in memory that triton asks its allocator for.

    That is ours inside, and the user's again afterwards.
    """
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def inside() -> None:
        triton.set_allocator(allocate)
        launch()

    contextvars.copy_context().run(inside)
