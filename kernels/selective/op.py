"""The operator ``attnrewrite::selective_attention``: strips of queries, closed-form backward.

Forward carries the votes that every key has received from one strip to the next. Backward goes the other way: with
dL' the gradient by the penalised logits and G = Σ_h dL',

    dF = -γ G      dZ[k,j] = Σ_{i>k} dF[i,j] where k may vote on j and Z[k,j] > 0      dγ = -Σ G∘F

so it carries the sum of dF over later queries. The state of forward is computed anew from the selection head alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.selective import reference
from attnrewrite.kernels.selective.ballot import Ballot, attend
from attnrewrite.kernels.selective.reference import check_selective
from attnrewrite.kernels.strips import Gradients
from attnrewrite.kernels.visibility import accumulation_dtype, full_precision


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    selection_head: int = 0,
    gamma: float | Tensor = 1.0,
    protect_first: bool = True,
    softcap: float | None = None,
) -> Tensor:
    """Compute ``reference.selective_attention`` in strips, with a closed-form backward."""
    check_selective(
        query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, window, selection_head, gamma, softcap
    )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    strength = gamma if isinstance(gamma, Tensor) else query.new_full((), gamma, dtype=accumulation_dtype(query.dtype))
    seed = strips.draw_seed(query, dropout_p)
    numbers = (factor, dropout_p, is_causal, window, softcap, selection_head, protect_first)
    out: Tensor = _forward(query, key, value, strength, attn_mask, seed, *numbers)
    return out


selective_attention.__doc__ = reference.selective_attention.__doc__


@torch.library.custom_op("attnrewrite::selective_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    selection_head: int,
    protect_first: bool,
) -> Tensor:
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap)
    with full_precision(query.device):
        ballot = Ballot.of(query, key, attn_mask, how, selection_head, protect_first)
        return attend(query, key, value, gamma, attn_mask, how, ballot)[0]


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("attnrewrite::selective_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    selection_head: int,
    protect_first: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by query, key, value, gamma and bias; an empty one where there is no bias."""
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap)
    (B, H, L, _), S = query.shape, key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    with full_precision(query.device):
        q, k, v, g, strength = (x.to(dtype) for x in (query, key, value, upstream, gamma))
        delta = (g * out.to(dtype)).sum(-1, keepdim=True)  # [B, H, L, 1]
        total = Gradients.zeros(q, k, v, attn_mask if bias_needs_grad else None)
        ballot = Ballot.of(q, k, attn_mask, how, selection_head, protect_first)
        spans = list(strips.spans(B, H, L, S, how))
        states = list(ballot.states(q, k, attn_mask, spans))
        later, by_gamma = q.new_zeros(B, S), q.new_zeros(())
        for rows, cols in reversed(spans):
            part = strips.strip(q, k, attn_mask, how, rows, cols)
            own = part.logits[:, selection_head]
            penalty = ballot.penalty(part, own, states.pop())
            weights = masked_softmax(part.logits - strength * penalty.unsqueeze(1), part.seen)
            by_logit = total.through_weights(part, weights, g, v, delta, how)
            summed = by_logit.sum(1)  # [B, rows, cols]
            by_gamma -= (summed * penalty).sum()
            by_penalty = -strength * summed
            whole = by_penalty.sum(1)
            after = later[:, None, cols] + whole.unsqueeze(1) - torch.cumsum(by_penalty, dim=1)
            later[:, cols] += whole
            by_logit[:, selection_head] += torch.where(ballot.may_vote(part) & (own > 0), after, 0.0)
            total.add_scores(part, by_logit, q, k, how)
    by_bias = query.new_empty(0) if total.bias is None or attn_mask is None else total.bias.to(attn_mask.dtype)
    by_query, by_key, by_value = total.query.to(query.dtype), total.key.to(key.dtype), total.value.to(value.dtype)
    return by_query, by_key, by_value, by_gamma.to(gamma.dtype), by_bias


@_backward.register_fake
def _(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias = query.new_empty(0) if attn_mask is None or not rest[-1] else torch.empty_like(attn_mask)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(gamma), bias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, gamma, attn_mask, seed, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, gamma, output, attn_mask, seed)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    wants_bias = ctx.needs_input_grad[4]
    *found, by_bias = _backward(upstream, *ctx.saved_tensors, *ctx.numbers, wants_bias)
    return *found, by_bias if wants_bias else None, *(None for _ in range(8))


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_attention)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return strips.flops(query[0], query[1], query[2], key[2], query[3] + value[3])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_attention_backward)
def _backward_flops(upstream: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    whole = strips.flops(query[0], query[1], query[2], key[2], 3 * query[3] + 2 * value[3])
    return whole + strips.flops(query[0], 1, query[2], key[2], query[3])
