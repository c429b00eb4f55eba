"""Who is measured in which case, by the names in the goals: attentions of the registry, and a few of the goals' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite import functional
from attnrewrite.bench.attentions import Attention
from attnrewrite.bench.case import Attend, Case, Setting
from attnrewrite.bench.peers import PEERS
from attnrewrite.bench.variants import variant
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
)

DEAD_PERIOD, DEAD_TILE = 4, 128
"""Of every four runs of so many keys three are voted out."""


def _dead(s: Setting) -> Attend:
    """Head 0 votes for three of four runs of keys, so strongly that after some rows nothing is left of them."""
    query, key = s.query.detach().clone(), s.key.detach().clone()
    place = torch.arange(s.case.N, device=s.device)
    doomed = (place // DEAD_TILE % DEAD_PERIOD != 0).to(query.dtype)
    key[:, 0] *= 0.01
    query[:, 0, :, 0] = 8.0
    key[:, 0, :, 0] = 8.0 * doomed
    return lambda _, __, v: functional.selective_attention(query, key, v.detach())


def _vanilla(s: Setting) -> Attend:
    return _block(s, 3, lambda x: functional.attention(*x))


def _symmetric(s: Setting) -> Attend:
    pair = s.learned(s.normal("pair", "H", "D", "D"))
    return _block(s, 2, lambda x: functional.symmetric_attention(*x, pair))


def _block(s: Setting, projections: int, attend: Callable[[list[Tensor]], Tensor]) -> Attend:
    """Return projections of hidden states [B, N, H D], and the attention of what they give."""
    H, D = s.case.H, s.case.D
    hidden = s.learned(s.normal("hidden", "B", "N", H * D))
    weights = [s.normal(f"weight {n}", H * D, H * D) / (H * D) ** 0.5 for n in range(projections)]
    return lambda *_: attend([F.linear(hidden, w).unflatten(-1, (H, D)).transpose(1, 2) for w in weights])


_SELECTIVE = variant("selective:mode=gate")  # its strength lies on the device, as a converted layer has it


def _step(s: Setting) -> Attend:
    """Compile a step, as its peer is: votes and protected keys grow in two small kernels."""
    return s.compile(_SELECTIVE.make(s))


def _without_gradients(s: Setting) -> Attend:
    """Compile selective attention for its forward pass alone, which saves nothing for another."""
    attend = PEERS["selective-inductor"].make(s)
    return lambda q, k, v: attend(q.detach(), k.detach(), v.detach())


_BY_CASE: dict[str, dict[str, Attention]] = {
    BLOCK.name: {
        SYMMETRIC: Attention(_symmetric, None, forward_only=True),
        VANILLA: Attention(_vanilla, None, forward_only=True),
    },
    DECODE.name: {STEP: replace(_SELECTIVE, make=_step), FLEX_STEP: PEERS["flex"]},
}
_USUAL = {
    PLAIN: variant("sdpa"),
    SELECTIVE: variant("selective:mode=raw"),
    SSA: variant("ssa"),
    DEAD: Attention(_dead, None, forward_only=True),
    FLASH: PEERS["sdpa-flash"],
    CUDNN: PEERS["sdpa-cudnn"],
    FLEX: PEERS["flex"],
    FLEX_TMA: PEERS["flex-tma"],
    FLEX_F: PEERS["selective-flex"],
    EAGER: PEERS["eager-inductor"],
    EAGER_SELECTIVE: replace(PEERS["selective-inductor"], make=_without_gradients, forward_only=True),
}


def providers(case: Case) -> Mapping[str, Attention]:
    """Return who is measured in a case, by name."""
    return _BY_CASE.get(case.name, _USUAL)


def passes(case: Case) -> tuple[str, ...]:
    """Return the passes that are measured in a case."""
    return ("forward",) if case.name in _BY_CASE else ("forward", "backward")
