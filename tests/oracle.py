"""The one bar for correctness: error against float64 at most twice that of ordinary PyTorch in the same precision."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BAR = 2.0


class Float64(TorchFunctionMode):
    """Runs a model in float64 even where its code asks for a narrower dtype (softmax in fp32, casts)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x in (torch.float32, torch.bfloat16, torch.float16) else x

        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(wide(a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide(v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def tensor_of(output: Any) -> Tensor:
    """Return the first tensor of a model's output."""
    return output if isinstance(output, Tensor) else output[0]


def run(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of all parameters under a fixed, uneven loss."""
    model.zero_grad(set_to_none=True)
    out = tensor_of(model(**inputs))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def exact(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a copy of the model in float64."""
    wide = copy.deepcopy(model).double()
    doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with Float64():
        return run(wide, doubled)


def error(found: Tensor, true: Tensor) -> float:
    """Return the relative error in the Euclidean norm."""
    return float((found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-300))


def assert_as_good(name: str, found: Tensor, ordinary: Tensor, true: Tensor) -> None:
    """Assert the bar: our error against float64 is at most twice that of ordinary PyTorch.

    Ordinary PyTorch may round luckily, so its error counts as at least a quarter of a rounding step. A gradient that is
    zero but for rounding (a key's bias in front of a softmax) must stay within the rounding of its summands.
    """
    step = torch.finfo(found.dtype).eps
    size = float(true.numel()) ** 0.5
    if float(true.double().norm()) < 1e-7 * size:
        assert float(found.double().norm()) <= max(BAR * float(ordinary.double().norm()), 4 * step * size), name
        return
    ours, theirs = error(found, true), error(ordinary, true)
    assert ours <= BAR * max(theirs, step / 4), f"{name}: error {ours:.2e}, ordinary PyTorch {theirs:.2e}"
