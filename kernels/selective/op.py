"""The operator ``attnrewrite::selective_attention``: strips of queries, closed-form backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.choice import generated
from attnrewrite.kernels.dense.voter import unfit
from attnrewrite.kernels.selective import reference
from attnrewrite.kernels.selective.backward import gradients
from attnrewrite.kernels.selective.ballot import Ballot, attend, selector
from attnrewrite.kernels.selective.cost import backward_flops, forward_flops
from attnrewrite.kernels.selective.reference import check_selective, check_selector
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
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Compute ``reference.selective_attention`` on generated kernels, or in strips; with a closed-form backward."""
    check_selective(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        enable_gqa,
        window,
        selection_head,
        gamma,
        softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    check_selector(query, key, vote_query, vote_key)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    strength = gamma if isinstance(gamma, Tensor) else query.new_full((), gamma, dtype=accumulation_dtype(query.dtype))
    if generated(query, value, unfit(query, vote_query, vote_key)):
        from attnrewrite.kernels.dense.selective_op import selective_kernels  # defines an operator

        how = strips.Options(factor, is_causal, window, softcap, dropout_p=dropout_p, sinks=sinks, slopes=alibi_slopes)
        seed = strips.draw_seed(query, dropout_p)
        tensors = (query, key, value, strength, attn_mask, seed)
        own = selector(vote_query, vote_key)
        return selective_kernels(
            *tensors, how, selection_head=selection_head, protect_first=protect_first, selector=own
        )[0]
    seed = strips.draw_seed(query, dropout_p)
    numbers = (factor, dropout_p, is_causal, window, softcap, selection_head, protect_first)
    added = (vote_query, vote_key, sinks, alibi_slopes)
    out: Tensor = _forward(query, key, value, strength, attn_mask, seed, *numbers, *added)
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
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap, sinks=sinks, slopes=alibi_slopes)
    ballot = Ballot(how, selection_head, selector=selector(vote_query, vote_key))
    with full_precision(query.device):
        if protect_first:
            ballot.protect(query, key, attn_mask)
        return attend(query, key, value, gamma, attn_mask, ballot)[0]


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
    vote_query: Tensor | None,
    vote_key: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias_needs_grad: bool,
) -> list[Tensor]:
    """Return the gradients by query, key, value, gamma, bias, and the four behind; empty ones by what is absent."""
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap, sinks=sinks, slopes=alibi_slopes)
    ballot = Ballot(how, selection_head, selector=selector(vote_query, vote_key))
    with full_precision(query.device):
        if protect_first:
            ballot.protect(query, key, attn_mask)
        found = gradients(
            upstream, None, query, key, value, gamma, out, attn_mask, ballot, bias_needs_grad=bias_needs_grad
        )
    return found.listed()


@_backward.register_fake
def _(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *_, vote_query, vote_key, sinks, slopes, bias_needs_grad = rest
    given = (query, key, value, gamma, attn_mask if bias_needs_grad else None, vote_query, vote_key, sinks, slopes)
    return [query.new_empty(0) if x is None else torch.empty_like(x) for x in given]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, gamma, attn_mask, seed, *ctx.numbers = inputs[:-4]
    ctx.save_for_backward(query, key, value, gamma, output, attn_mask, seed, *inputs[-4:])


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    tensors, added = ctx.saved_tensors[:-4], ctx.saved_tensors[-4:]
    wants_bias = ctx.needs_input_grad[4]
    found = _backward(upstream, *tensors, *ctx.numbers, *added, wants_bias)
    by_added = (None if x is None else by for x, by in zip(added, found[5:], strict=True))
    return *found[:4], found[4] if wants_bias else None, *(None for _ in range(8)), *by_added


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_attention)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return forward_flops(query, key, value, rest[10:])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_attention_backward)
def _backward_flops(upstream: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return backward_flops(query, key, value, rest[11:])
