"""Plain attention to change in one place, compiled and compared with eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.report import Report, Site

WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """Plain multi-head attention with one change to override."""

    def __init__(self, heads: int = HEADS, width: int = WIDTH) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = self.mask(q @ k.mT * q.shape[-1] ** -0.5)
        return self.o((torch.softmax(scores, -1) @ v).transpose(-3, -2).flatten(-2))


def compiled_like_eager(model: nn.Module | Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Site]:
    """Compile ``model``, compare values and gradients with eager PyTorch, and return the sites."""
    torch._dynamo.reset()
    reports: list[Report] = []
    backend = attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, **options)
    torch.manual_seed(1)
    ordinary, theirs = gradients(model, inputs)
    torch.manual_seed(1)
    found, ours = gradients(compiled, inputs)
    for a, b in zip(found, ordinary, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    return [site for report in reports for site in report.sites]


def gradients(model: Any, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = model(*leaves)
    found = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in leaves if x.requires_grad]
    if not any(x.requires_grad for x in found):
        return found, []
    total = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in found)
    return [x.detach() for x in found], list(torch.autograd.grad(total, wanted))


def rewritten(sites: list[Site]) -> bool:
    return len(sites) == 1 and sites[0].status == "rewritten" and sites[0].certificate == "proved"
