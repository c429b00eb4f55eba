"""The operator ``attnrewrite::symmetric_attention``: strips of queries, closed-form backward.

With P the weights, dP = dO Vᵀ and dS = scale P (dP - rowsum(dO O)), the gradients are those of plain attention of
q = r S and k = r, brought back to the one tensor they came from:

    dr = dq Sᵀ + dk      dS_h = Σ_b rᵀ dq      and where S = I: dr = (dS + dSᵀ) r
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.choice import generated
from attnrewrite.kernels.symmetric import reference
from attnrewrite.kernels.symmetric.reference import check_symmetric, pairwise_query, through_pair
from attnrewrite.kernels.visibility import full_precision


def symmetric_attention(
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    softcap: float | None = None,
    mask_self: bool = False,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Compute ``reference.symmetric_attention`` on generated kernels, or in strips; with a closed-form backward."""
    check_symmetric(
        shared,
        value,
        pair,
        attn_mask,
        dropout_p,
        is_causal,
        enable_gqa,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    factor = shared.shape[-1] ** -0.5 if scale is None else scale
    seed = strips.draw_seed(shared, dropout_p)
    if generated(shared, value, "queries do not see themselves" if mask_self else None):
        from attnrewrite.kernels.dense.symmetric_op import symmetric_kernels  # defines an operator

        how = strips.Options(factor, is_causal, window, softcap, dropout_p=dropout_p, sinks=sinks, slopes=alibi_slopes)
        return symmetric_kernels(shared, value, pair, attn_mask, seed, how)
    numbers = (factor, dropout_p, is_causal, window, softcap, mask_self)
    out: Tensor = _forward(shared, value, pair, attn_mask, seed, *numbers, sinks, alibi_slopes)
    return out


symmetric_attention.__doc__ = reference.symmetric_attention.__doc__


@torch.library.custom_op("attnrewrite::symmetric_attention", mutates_args=())
def _forward(
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    mask_self: bool,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap, mask_self, sinks, alibi_slopes)
    query = shared if pair is None else pairwise_query(shared, pair)
    with full_precision(shared.device):
        return strips.forward(query, shared, value, attn_mask, how)


@_forward.register_fake
def _(shared: Tensor, value: Tensor, pair: Tensor | None, *rest: object) -> Tensor:
    heads = shared.shape[1] if pair is None else pair.shape[0]
    return shared.new_empty(shared.shape[0], heads, shared.shape[2], value.shape[3])


@torch.library.custom_op("attnrewrite::symmetric_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    out: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    mask_self: bool,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias_needs_grad: bool,
) -> list[Tensor]:
    """Return the gradients by shared, value, pair, bias, sinks and slopes; empty ones for those that there are not."""
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap, mask_self, sinks, alibi_slopes)
    query = shared if pair is None else pairwise_query(shared, pair)
    with full_precision(shared.device):
        found = strips.backward(upstream, query, shared, value, out, attn_mask, how, bias_needs_grad)
        if pair is None:
            by_shared, by_pair = found.query + found.key, shared.new_empty(0)
        else:
            by_query, by_pair = through_pair(found.query, shared, pair)
            by_shared = by_query + found.key
    added = strips.as_given((found.bias, found.sinks, found.slopes), (attn_mask, sinks, alibi_slopes), shared)
    return [by_shared.to(shared.dtype), found.value.to(value.dtype), by_pair, *added]


@_backward.register_fake
def _(
    upstream: Tensor,
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    out: Tensor,
    attn_mask: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *_, sinks, slopes, bias_needs_grad = rest
    given = (shared, value, pair, attn_mask if bias_needs_grad else None, sinks, slopes)
    return [shared.new_empty(0) if x is None else torch.empty_like(x) for x in given]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    shared, value, pair, attn_mask, seed, *ctx.numbers = inputs[:-2]
    ctx.save_for_backward(shared, value, pair, output, attn_mask, seed, *inputs[-2:])


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks, slopes = ctx.saved_tensors
    found = _backward(upstream, *tensors, *ctx.numbers, sinks, slopes, ctx.needs_input_grad[3])
    needs = (*ctx.needs_input_grad[:4], *ctx.needs_input_grad[-2:])
    given = [by if needed else None for by, needed in zip(found, needs, strict=True)]
    return *given[:4], *(None for _ in range(7)), *given[4:]


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.symmetric_attention)
def _flops(shared: Any, value: Any, pair: Any, *rest: Any, **_: Any) -> int:
    H = shared[1] if pair is None else pair[0]
    products = strips.flops(shared[0], H, shared[2], shared[2], shared[3] + value[3])
    return products + (0 if pair is None else 2 * shared[0] * H * shared[2] * shared[3] ** 2)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.symmetric_attention_backward)
def _backward_flops(upstream: Any, shared: Any, value: Any, pair: Any, *rest: Any, **_: Any) -> int:
    H = upstream[1]
    products = strips.flops(shared[0], H, shared[2], shared[2], 3 * shared[3] + 2 * value[3])
    return products + (0 if pair is None else 6 * shared[0] * H * shared[2] * shared[3] ** 2)
