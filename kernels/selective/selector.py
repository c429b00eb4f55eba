"""A selector in a layer: linear maps of the layer's input to the queries and keys of votes, and to what else is new."""

from __future__ import annotations

import torch
from torch import Tensor


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x weightᵀ`` ``[..., out]`` for ``x`` ``[..., in]`` and ``weight`` ``[out, in]``, in the wider dtype."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype))
