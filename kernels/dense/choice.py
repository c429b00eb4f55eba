"""Whether a call of the dense family runs on generated kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error

Kernels = Literal["auto", "triton", "reference"]
_wanted: Kernels = "auto"  # no context variable: Dynamo cannot read those, and this is read where it traces

LARGEST_HEAD = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@contextmanager
def kernels(wanted: Kernels) -> Iterator[None]:
    """Choose for all calls inside. "auto" takes kernels on a GPU where there are any, the reference elsewhere."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def generated(query: Tensor, value: Tensor, *reasons: str | None, fused: bool = False) -> bool:
    """Whether to run generated kernels, for tensors ``[B, H, L, D]`` and ``[B, Hkv, S, Dv]``.

    ``reasons`` are what the caller has against it, None where nothing; ``fused``: torch has an operator for it, which
    "auto" leaves to do it. Raises LoweringError AR403 where kernels are asked for and there are none.
    """
    if _wanted == "reference" or (_wanted == "auto" and (fused or not query.is_cuda)):
        return False
    against = next((reason for reason in (*reasons, *_unfit(query, value)) if reason), None)
    if against and _wanted == "triton":
        raise error("AR403", against)
    return against is None


def no_device() -> str | None:
    """Return why this machine cannot run kernels, or None."""
    if torch.cuda.is_available() or interpreted():
        return None
    return "this machine has no GPU that triton can use"


def interpreted() -> bool:
    """Whether triton interprets kernels, which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def _unfit(query: Tensor, value: Tensor) -> Iterator[str]:
    missing = no_device()
    if missing:
        yield missing
    elif not query.is_cuda and not interpreted():
        yield f"the tensors are on {query.device}"
    if query.dtype not in _DTYPES:
        yield f"there is no kernel for {query.dtype}"
    for features in (query.shape[3], value.shape[3]):
        if not 1 <= features <= LARGEST_HEAD:
            yield f"a head has {features} features; kernels take up to {LARGEST_HEAD}"
