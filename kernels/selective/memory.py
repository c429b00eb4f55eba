"""The operator ``attnrewrite::selective_memory``: how many keys each query still needs, with a closed-form backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.selective import reference
from attnrewrite.kernels.selective.ballot import Ballot, first_state, selector
from attnrewrite.kernels.selective.reference import check_selective, check_selector, seen_by
from attnrewrite.kernels.strips import Gradients, Options, Strip
from attnrewrite.kernels.visibility import accumulation_dtype, full_precision


def selective_memory(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    selection_head: int = 0,
    gamma: float | Tensor = 1.0,
    protect_first: bool = True,
    softcap: float | None = None,
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    tau: float = 1.0,
) -> Tensor:
    """Compute ``reference.selective_memory`` in strips of the selection head, with a closed-form backward."""
    check_selective(query, key, key, attn_mask, 0.0, is_causal, enable_gqa, window, selection_head, gamma, softcap)
    check_selector(query, key, vote_query, vote_key)
    check_threshold(tau)
    dtype = accumulation_dtype(query.dtype)
    how = Options(query.shape[-1] ** -0.5 if scale is None else scale, is_causal, window, softcap)
    ballot = Ballot(how, selection_head, selector=selector(vote_query, vote_key))
    voter = ballot.voter(query.to(dtype), key.to(dtype), attn_mask)
    strength = gamma.to(dtype) if isinstance(gamma, Tensor) else query.new_full((), gamma, dtype=dtype)
    numbers = (voter.how.scale, is_causal, window, voter.how.softcap, protect_first, tau)
    out: Tensor = _forward(voter.query, voter.key, strength, voter.mask, *numbers)
    return out


selective_memory.__doc__ = reference.selective_memory.__doc__


def check_threshold(tau: float) -> None:
    """Raise AR402 unless the penalty that frees a key is positive."""
    if not tau > 0:
        raise error("AR402", f"tau is {tau}; it must be greater than 0", hint="")


@torch.library.custom_op("attnrewrite::selective_memory", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    gamma: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    protect_first: bool,
    tau: float,
) -> Tensor:
    """Return ``[B, L]`` for one head, whose tensors are in the accumulation dtype."""
    (B, _, L, _), S = query.shape, key.shape[2]
    ballot = _ballot(query, key, attn_mask, Options(scale, is_causal, window, softcap), protect_first)
    needed, state = query.new_empty(B, L), first_state(key, None)
    with full_precision(query.device):
        for rows, cols in strips.spans(B, 1, L, S, ballot.how):
            part = strips.strip(query, key, attn_mask, ballot.how, rows, cols)
            penalty = ballot.penalty(part, part.logits[:, 0], state)
            kept = 1 - (gamma * penalty).clamp(max=tau) / tau
            needed[:, rows] = torch.where(_seen(part), kept, 0.0).sum(-1)
    return needed


@_forward.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2])


@torch.library.custom_op("attnrewrite::selective_memory_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    gamma: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    protect_first: bool,
    tau: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by query, key, gamma and bias; an empty one where there is no bias."""
    (B, _, L, _), S = query.shape, key.shape[2]
    ballot = _ballot(query, key, attn_mask, Options(scale, is_causal, window, softcap), protect_first)
    total = Gradients.zeros(query, key, key, attn_mask if bias_needs_grad else None, ballot.how)
    later, by_gamma = first_state(key, None), torch.zeros_like(gamma)
    with full_precision(query.device):
        spans = list(strips.spans(B, 1, L, S, ballot.how))
        states = list(ballot.states(ballot.voter(query, key, attn_mask), spans))
        for rows, cols in reversed(spans):
            part = strips.strip(query, key, attn_mask, ballot.how, rows, cols)
            own = part.logits[:, 0]
            penalty = ballot.penalty(part, own, states.pop())
            by_kept = -upstream[:, rows, None] / tau  # by gamma F
            by_kept = torch.where(_seen(part) & (gamma * penalty < tau), by_kept, 0.0)
            by_gamma += (by_kept * penalty).sum()
            by_vote = ballot.by_logits(part, own, gamma * by_kept, later)
            total.add_scores(part, by_vote.unsqueeze(1), query, key, ballot.how)
    by_bias = query.new_empty(0) if total.bias is None or attn_mask is None else total.bias.to(attn_mask.dtype)
    return total.query, total.key, by_gamma, by_bias


@_backward.register_fake
def _(
    upstream: Tensor, query: Tensor, key: Tensor, gamma: Tensor, attn_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    bias = query.new_empty(0) if attn_mask is None or not rest[-1] else torch.empty_like(attn_mask)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(gamma), bias


def _ballot(query: Tensor, key: Tensor, attn_mask: Tensor | None, how: Options, protect_first: bool) -> Ballot:
    ballot = Ballot(how, 0)
    if protect_first:
        ballot.protect(query, key, attn_mask)
    return ballot


def _seen(part: Strip) -> Tensor:
    """Return which keys of a strip of one head are visible, broadcastable to ``[B, rows, cols]``."""
    seen = seen_by(part.seen, 0)
    return torch.ones_like(part.logits[:, 0], dtype=torch.bool) if seen is None else seen


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, gamma, attn_mask, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, gamma, attn_mask)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    wants_bias = ctx.needs_input_grad[3]
    *found, by_bias = _backward(upstream, *ctx.saved_tensors, *ctx.numbers, wants_bias)
    return *found, by_bias if wants_bias else None, *(None for _ in range(6))


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_memory)
def _flops(query: Any, key: Any, *rest: Any, **_: Any) -> int:
    return strips.flops(query[0], 1, query[2], key[2], query[3])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_memory_backward)
def _backward_flops(upstream: Any, query: Any, key: Any, *rest: Any, **_: Any) -> int:
    return strips.flops(query[0], 1, query[2], key[2], 4 * query[3])
