"""What is run: sizes, and the tensors drawn for them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.dense.choice import Kernels

FORWARD, BACKWARD, BOTH, DECODE = "forward", "backward", "forward+backward", "decode"
PASSES = (FORWARD, BACKWARD, BOTH, DECODE)
_COST = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5, DECODE: 1.0}
"""In forward passes: backward has five products for two."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, H, L, D], keys and values [B, Hkv, N, D] to [B, H, L, D]."""


class Case(NamedTuple):
    """Queries ``[B, H, L, D]`` to keys and values ``[B, Hkv, N, D]``: L = N, or 1 in a ``step`` of decoding."""

    name: str
    B: int
    H: int
    N: int
    D: int
    causal: bool = True
    groups: int = 0
    """Hkv; 0 is H."""
    step: bool = False

    @property
    def Hkv(self) -> int:  # noqa: N802  # the letter of a size
        """Heads of keys and values."""
        return self.groups or self.H

    @property
    def L(self) -> int:  # noqa: N802  # the letter of a size
        """Queries."""
        return 1 if self.step else self.N

    @property
    def masked(self) -> bool:
        """Whether some query has later keys, which it must not see."""
        return self.causal and not self.step

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key, per head."""
        return self.N * (self.N + 1) // 2 if self.masked else self.L * self.N


def flops(case: Case, metric: str) -> float:
    """Return the FLOPs of plain attention over visible pairs, whatever is run."""
    return 4 * case.B * case.H * case.pairs * case.D * _COST[metric]


@dataclass
class Setting:
    """Where and how a case is run.

    compiled: whether peers that need a compiler get it.
    kernels: which implementation the library's own attentions take, as in ``functional.kernels``.
    """

    case: Case
    device: torch.device
    dtype: torch.dtype
    compiled: bool
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        """Draw queries, keys and values, of which gradients are taken but in a step, and the output's gradient."""
        self.query = self.learned(self.normal("query", "B", "H", "L", "D"))
        self.key, self.value = (self.learned(self.normal(name, "B", "Hkv", "N", "D")) for name in ("key", "value"))
        self.upstream = self.normal("upstream", "B", "H", "L", "D")

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def normal(self, name: str, *dims: str | int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a tensor; a dim is a number or a size of the case. The same name gives the same numbers."""
        shape, generator = self._whole(dims), self._generator(name)
        drawn = torch.randn(shape, device=self.device, dtype=dtype or self.dtype, generator=generator)
        return self._taken(drawn, dims)

    def uniform(self, name: str, *dims: str | int) -> Tensor:
        """Draw numbers between 0.5 and 1.5, in float32."""
        shape = self._whole(dims)
        return self._taken(torch.rand(shape, device=self.device, generator=self._generator(name)) + 0.5, dims)

    def learned(self, tensor: Tensor) -> Tensor:
        """Let a tensor ask for its gradient, but in a step."""
        return tensor.requires_grad_(not self.case.step)

    def compile(self, function: Callable[..., Tensor], **how: Any) -> Callable[..., Tensor]:
        """Compile for these sizes alone."""
        return torch.compile(function, dynamic=False, **how) if self.compiled else function

    def exact(self, heads: int | None) -> Setting:
        """Return the same numbers in float64, of the first batch entry and at least the first ``heads`` (None: all)."""
        return _Exact(self.case, self.device, self.dtype, False, "reference", heads=heads or self.case.H)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))

    def _whole(self, dims: tuple[str | int, ...]) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else getattr(self.case, dim) for dim in dims)

    def _taken(self, drawn: Tensor, dims: tuple[str | int, ...]) -> Tensor:
        return drawn


@dataclass
class _Exact(Setting):
    """Draws for the whole case, and keeps a part of it, in float64."""

    heads: int = 0

    def __post_init__(self) -> None:
        self._drawn = self.case
        group = self.case.H // self.case.Hkv
        groups = min(self.case.Hkv, -(-self.heads // group))
        self.case = self.case._replace(B=1, H=groups * group, groups=groups)
        super().__post_init__()

    def _whole(self, dims: tuple[str | int, ...]) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else getattr(self._drawn, dim) for dim in dims)

    def _taken(self, drawn: Tensor, dims: tuple[str | int, ...]) -> Tensor:
        for place, dim in enumerate(dims):
            if isinstance(dim, str):
                drawn = drawn.narrow(place, 0, getattr(self.case, dim))
        return drawn.double()
