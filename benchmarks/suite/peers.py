"""Who is measured: this library's attentions on generated kernels, and what others offer for the same.

The rules of a fair comparison: everything at its best setting, masks built beforehand, no dynamic shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnrewrite import functional
from attnrewrite.kernels.selective import reference as selective
from suite.attentions import plain
from suite.goals import (
    BLOCK,
    CUDNN,
    DEAD,
    DECODE,
    EAGER,
    EAGER_SELECTIVE,
    FLASH,
    FLEX,
    FLEX_F,
    FLEX_STEP,
    FLEX_TMA,
    PLAIN,
    SELECTIVE,
    SSA,
    STEP,
    SYMMETRIC,
    VANILLA,
    Case,
)

Run = Callable[[], Tensor]
DEAD_PERIOD, DEAD_TILE = 4, 128
"""Of every four runs of so many keys three are voted out."""


@dataclass
class Setting:
    """Where and how a case is run. ``compiled``: whether peers that need a compiler get it."""

    case: Case
    device: torch.device
    dtype: torch.dtype
    compiled: bool

    def __post_init__(self) -> None:
        """Draw the inputs."""
        torch.manual_seed(0)
        case = self.case
        rows = 1 if case.name == DECODE.name else case.N
        self.query = self.normal(case.B, case.H, rows, case.D)
        self.key, self.value = (self.normal(case.B, case.H, case.N, case.D) for _ in range(2))
        self.upstream = torch.randn_like(self.query)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, of which the gradients are taken."""
        return self.query, self.key, self.value

    def normal(self, *shape: int) -> Tensor:
        """Draw a tensor that asks for its gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()

    def compile(self, function: Callable[..., Tensor], **how: Any) -> Callable[..., Tensor]:
        """Compile for these sizes alone."""
        return torch.compile(function, dynamic=False, **how) if self.compiled else function

    def tuned(self) -> Callable[..., Any]:
        """Return flex_attention, tuned to its maximum."""
        return self.compile(flex_attention, mode="max-autotune-no-cudagraphs")


def _generated(function: Callable[[Setting], Run]) -> Callable[[Setting], Run]:
    def make(setting: Setting) -> Run:
        run = function(setting)

        def call() -> Tensor:
            with functional.kernels("triton"):
                return run()

        return call

    return make


@_generated
def _plain(s: Setting) -> Run:
    return lambda: functional.attention(*s.tensors, is_causal=s.case.causal)


@_generated
def _selective(s: Setting) -> Run:
    return lambda: functional.selective_attention(*s.tensors)


@_generated
def _ssa(s: Setting) -> Run:
    taus = [(torch.rand(s.query.shape[:3], device=s.device) + 0.5).requires_grad_() for _ in range(2)]
    return lambda: functional.ssa_attention(*s.tensors, *taus, is_causal=s.case.causal)


@_generated
def _dead(s: Setting) -> Run:
    """Head 0 votes for three of four runs of keys, so strongly that after some rows nothing is left of them."""
    query, key = s.query.detach().clone(), s.key.detach().clone()
    place = torch.arange(s.case.N, device=s.device)
    doomed = (place // DEAD_TILE % DEAD_PERIOD != 0).to(s.dtype)
    key[:, 0] *= 0.01
    query[:, 0, :, 0] = 8.0
    key[:, 0, :, 0] = 8.0 * doomed
    return lambda: functional.selective_attention(query, key, s.value.detach())


@_generated
def _vanilla(s: Setting) -> Run:
    return _block(s, 3, lambda x: functional.attention(*x))


@_generated
def _symmetric(s: Setting) -> Run:
    pair = s.normal(s.case.H, s.case.D, s.case.D)
    return _block(s, 2, lambda x: functional.symmetric_attention(*x, pair))


def _block(s: Setting, projections: int, attend: Callable[[list[Tensor]], Tensor]) -> Run:
    """Return projections of hidden states [B, N, H D], and the attention of what they give."""
    B, H, N, D = s.case.B, s.case.H, s.case.N, s.case.D
    hidden = s.normal(B, N, H * D)
    weights = [s.normal(H * D, H * D).detach() / (H * D) ** 0.5 for _ in range(projections)]
    return lambda: attend([F.linear(hidden, w).view(B, N, H, D).transpose(1, 2) for w in weights])


@_generated
def _step(s: Setting) -> Run:
    query, key, value = (x.detach() for x in s.tensors)
    B, S = key.shape[0], key.shape[2]
    state = functional.SelectionState(
        torch.rand(B, S - 1, device=s.device), torch.zeros(B, S - 1, dtype=torch.bool, device=s.device)
    )
    return lambda: functional.selective_decode(query, key, value, state)[0]


def _sdpa(backend: SDPBackend) -> Callable[[Setting], Run]:
    def make(s: Setting) -> Run:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*s.tensors, is_causal=s.case.causal)

        return call

    return make


def _flex(options: dict[str, Any] | None) -> Callable[[Setting], Run]:
    def make(s: Setting) -> Run:
        attend, mask = s.tuned(), _causal(s)
        return lambda: attend(*s.tensors, block_mask=mask, kernel_options=options)

    return make


def _flex_step(s: Setting) -> Run:
    attend, tensors = s.tuned(), [x.detach() for x in s.tensors]
    return lambda: attend(*tensors)


def _flex_votes(s: Setting) -> Run:
    """Make selective attention as FlexAttention can have it: compiled votes, which a score_mod reads."""
    attend, mask = s.tuned(), _causal(s)
    penalties = s.compile(_penalties)
    query, key, value = (x.detach() for x in s.tensors)

    def call() -> Tensor:
        penalty = penalties(query, key)
        return attend(query, key, value, score_mod=lambda x, b, h, i, j: x - penalty[b, i, j], block_mask=mask)

    return call


def _penalties(query: Tensor, key: Tensor) -> Tensor:
    """Return F [B, N, N] of head 0: the votes of strictly earlier rows; none on oneself, nor on the first key."""
    logits = (query[:, 0] @ key[:, 0].mT).float() * query.shape[-1] ** -0.5
    votes = logits.relu().tril(-1)
    votes[:, :, 0] = 0
    return (votes.cumsum(1) - votes).half()


def _eager(s: Setting) -> Run:
    attend = s.compile(plain)
    return lambda: attend(*s.tensors)


def _eager_selective(s: Setting) -> Run:
    attend = s.compile(selective.selective_attention)
    return lambda: attend(*(x.detach() for x in s.tensors))


def _causal(s: Setting) -> Any:
    N = s.case.N
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N, device=s.device)


_BY_CASE: dict[str, dict[str, Callable[[Setting], Run]]] = {
    BLOCK.name: {SYMMETRIC: _symmetric, VANILLA: _vanilla},
    DECODE.name: {STEP: _step, FLEX_STEP: _flex_step},
}
_USUAL: dict[str, Callable[[Setting], Run]] = {
    PLAIN: _plain,
    SELECTIVE: _selective,
    SSA: _ssa,
    DEAD: _dead,
    FLASH: _sdpa(SDPBackend.FLASH_ATTENTION),
    CUDNN: _sdpa(SDPBackend.CUDNN_ATTENTION),
    FLEX: _flex(None),
    FLEX_TMA: _flex({"USE_TMA": True}),
    FLEX_F: _flex_votes,
    EAGER: _eager,
    EAGER_SELECTIVE: _eager_selective,
}
FORWARD_ONLY = (DEAD, FLEX_F, EAGER_SELECTIVE, VANILLA, SYMMETRIC, STEP, FLEX_STEP)


def providers(case: Case) -> dict[str, Callable[[Setting], Run]]:
    """Return who is measured in a case, by name."""
    return _BY_CASE.get(case.name, _USUAL)


def exact(s: Setting, provider: str) -> Tensor | None:
    """Return the first batch entry's first two heads in float64, or None where there is no plain formula for it."""
    query, key, value = (x.detach()[:1, :2].double() for x in s.tensors)
    with functional.kernels("reference"):
        if provider in (PLAIN, FLASH, CUDNN, FLEX, FLEX_TMA, EAGER):
            return functional.attention(query, key, value, is_causal=s.case.causal)
        if provider in (SELECTIVE, FLEX_F, EAGER_SELECTIVE):
            return functional.selective_attention(query, key, value)
    return None
