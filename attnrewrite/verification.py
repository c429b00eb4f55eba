"""Check a converted model against the original on the example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

from attnrewrite.kernels.diagnostics import AttnRewriteError, error

_ROUNDING_STEPS = 2.0**12
"""How many units of rounding two orders of the same operations may differ by, relative to the largest output."""
_INNER = torch.finfo(torch.float32).eps
"""Models in float64 round to float32 inside, as for softmax, norms and rotary embedding; fused attention does not."""


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into eval mode for a while: no dropout, and no statistics are updated."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in before:
            module.training = mode


def outputs(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the floating-point tensors that the model gives in eval mode."""
    with evaluating(model):
        try:
            result = model(*args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, AttnRewriteError):
                raise failure.inner_exception from None
            raise
    values = list(result.values()) if isinstance(result, Mapping) else result
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def compare(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    expected: list[torch.Tensor] | None,
) -> None:
    """Run the converted model; where it promises the ``expected`` outputs, compare. Raises VariantError AR313."""
    try:
        found = outputs(model, args, kwargs)
    except AttnRewriteError as failure:
        if failure.code == "AR315":  # compiled, but there is nothing to run before calibration
            return
        raise
    if expected is None:
        return
    for number, (now, then) in enumerate(zip(found, expected, strict=True)):
        unit = max(_INNER, torch.finfo(then.dtype).eps)
        allowed = _ROUNDING_STEPS * unit * float(then.abs().nan_to_num(0.0).max()) if then.numel() else 0.0
        difference = float((now - then).abs().nan_to_num(0.0).max()) if then.numel() else 0.0
        if difference > allowed or bool((now.isnan() != then.isnan()).any()):
            raise error("AR313", f"output {number} differs by {difference:.3g}; rounding explains {allowed:.3g}")
