"""The one bar for correctness: error against float64 at most twice that of ordinary PyTorch in the same precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
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


def assert_no_worse(found: Tensor, ordinary: Tensor, true: Tensor, what: str = "", *, largest: bool = True) -> None:
    """Check the bar for one tensor: in the root mean square and, unless ``largest=False``, in the largest error."""
    off, bar = (found.double() - true).abs(), (ordinary.double() - true).abs()
    assert off.norm() <= BAR * bar.norm(), f"{what}: error {off.norm():.2e}, ordinary {bar.norm():.2e}"
    if largest:
        assert off.max() <= BAR * bar.max(), f"{what}: error {off.max():.2e}, ordinary {bar.max():.2e}"


def is_only_rounding(true: Tensor) -> bool:
    """Whether a gradient is zero but for rounding, such as that of a key's bias in front of a softmax."""
    return float(true.double().norm()) < 1e-7 * float(true.numel()) ** 0.5


def assert_as_good(name: str, found: Tensor, ordinary: Tensor, true: Tensor) -> None:
    """Assert the bar: our error against float64 is at most twice that of ordinary PyTorch.

    Ordinary PyTorch may round luckily, so its error counts as at least a quarter of a rounding step. A gradient that is
    only rounding must stay within the rounding of its summands.
    """
    step = torch.finfo(found.dtype).eps
    if is_only_rounding(true):
        limit = max(BAR * float(ordinary.double().norm()), 4 * step * float(true.numel()) ** 0.5)
        assert float(found.double().norm()) <= limit, name
        return
    ours, theirs = error(found, true), error(ordinary, true)
    assert ours <= BAR * max(theirs, step / 4), f"{name}: error {ours:.2e}, ordinary PyTorch {theirs:.2e}"


Outcome = tuple[Tensor, dict[str, Tensor]]
Draw = tuple[Outcome, Outcome, Outcome]


def assert_as_good_over(draws: Callable[[int], Draw], more: int = 7) -> None:
    """Assert the bar for output and gradients of ``draws(0)``: what we computed, ordinary PyTorch, float64.

    One draw says little about a gradient of few numbers: its error is a rounding step or less, and a lucky one of
    ordinary PyTorch is a fifth of that. What misses the bar in the first draw is decided by the root mean square over
    that draw and ``more`` others.
    """
    first = draws(0)
    doubtful = [name for name in ("output", *first[2][1]) if _misses(name, first)]
    if not doubtful:
        return
    everything = [first, *(draws(n) for n in range(1, more + 1))]
    for name in doubtful:
        pairs = [tuple(error(_of(name, x), _of(name, true)) for x in (a, b)) for a, b, true in everything]
        ours, theirs = (math.sqrt(sum(x * x for x in side) / len(pairs)) for side in zip(*pairs, strict=True))
        least = torch.finfo(_of(name, first[0]).dtype).eps / 4
        said = f"{name}: error {ours:.2e}, ordinary PyTorch {theirs:.2e} over {len(pairs)} draws"
        assert ours <= BAR * max(theirs, least), said


def _misses(name: str, draw: Draw) -> bool:
    ours, ordinary, true = (_of(name, x) for x in draw)
    try:
        assert_as_good(name, ours, ordinary, true)
    except AssertionError:
        if is_only_rounding(true):
            raise
        return True
    return False


def _of(name: str, outcome: Outcome) -> Tensor:
    return outcome[0] if name == "output" else outcome[1][name]
