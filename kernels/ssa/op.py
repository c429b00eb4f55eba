"""The operator ``attnrewrite::ssa_attention``: strips of queries, closed-form backward.

It is plain attention of q' = τ_q q, k and v' = τ_v v, and its gradients are those of that attention, taken through the
two products: dq = τ_q dq', dτ_q = dq'·q, dv = τ_v dv', dτ_v = dv'·v.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.choice import generated
from attnrewrite.kernels.ssa import reference
from attnrewrite.kernels.ssa.reference import check_ssa, scaled, through_scaled
from attnrewrite.kernels.visibility import full_precision


def ssa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_temperature: Tensor,
    value_temperature: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Compute ``reference.ssa_attention`` on generated kernels, or in strips; with a closed-form backward."""
    check_ssa(
        query,
        key,
        value,
        query_temperature,
        value_temperature,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    if generated(query, value):
        from attnrewrite.kernels.dense.op import dense_attention  # defines an operator, which takes its time

        return dense_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            window,
            softcap,
            query_temperature=query_temperature,
            value_temperature=value_temperature,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
    numbers = (query.shape[-1] ** -0.5 if scale is None else scale, dropout_p, is_causal, window, softcap)
    seed = strips.draw_seed(query, dropout_p)
    tensors = (query, key, value, query_temperature, value_temperature, attn_mask, seed)
    out: Tensor = _forward(*tensors, *numbers, sinks, alibi_slopes)
    return out


ssa_attention.__doc__ = reference.ssa_attention.__doc__


@torch.library.custom_op("attnrewrite::ssa_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_temperature: Tensor,
    value_temperature: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap, sinks=sinks, slopes=alibi_slopes)
    with full_precision(query.device):
        return strips.forward(scaled(query, query_temperature), key, scaled(value, value_temperature), attn_mask, how)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("attnrewrite::ssa_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_temperature: Tensor,
    value_temperature: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias_needs_grad: bool,
) -> list[Tensor]:
    """Return the gradients by the five tensors, bias, sinks and slopes; empty ones by what is absent."""
    how = strips.options(seed, scale, dropout_p, is_causal, window, softcap, sinks=sinks, slopes=alibi_slopes)
    with full_precision(query.device):
        q, v = scaled(query, query_temperature), scaled(value, value_temperature)
        found = strips.backward(upstream, q, key, v, out, attn_mask, how, bias_needs_grad)
        by_query, by_warmth = through_scaled(found.query, query, query_temperature)
        by_value, by_gain = through_scaled(found.value, value, value_temperature)
    added = strips.as_given((found.bias, found.sinks, found.slopes), (attn_mask, sinks, alibi_slopes), query)
    return [by_query, found.key.to(key.dtype), by_value, by_warmth, by_gain, *added]


@_backward.register_fake
def _(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_temperature: Tensor,
    value_temperature: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *_, sinks, slopes, bias_needs_grad = rest
    bias = attn_mask if bias_needs_grad else None
    given = (query, key, value, query_temperature, value_temperature, bias, sinks, slopes)
    return [query.new_empty(0) if x is None else torch.empty_like(x) for x in given]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, attn_mask, seed = inputs[:7]
    ctx.numbers = inputs[7:-2]
    ctx.save_for_backward(*tensors, output, attn_mask, seed, *inputs[-2:])


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks, slopes = ctx.saved_tensors
    found = _backward(upstream, *tensors, *ctx.numbers, sinks, slopes, ctx.needs_input_grad[5])
    needs = (*ctx.needs_input_grad[:6], *ctx.needs_input_grad[-2:])
    given = [by if needed else None for by, needed in zip(found, needs, strict=True)]
    return *given[:6], *(None for _ in range(6)), *given[6:]


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.ssa_attention)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return strips.flops(query[0], query[1], query[2], key[2], query[3] + value[3])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.ssa_attention_backward)
def _backward_flops(upstream: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return strips.flops(query[0], query[1], query[2], key[2], 3 * query[3] + 2 * value[3])
