"""The operator ``attnrewrite::sea_decode``: attention of new queries to the keys of a cache that they select.

Importing this module defines ``torch.ops.attnrewrite.sea_decode`` and its backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnrewrite.kernels.sea.backward import sparse_gradients
from attnrewrite.kernels.sea.reference import sparse_attention
from attnrewrite.kernels.sea.slices import Rows, Rule, visible_rows
from attnrewrite.kernels.visibility import accumulation_dtype, four_dimensional, full_precision


@torch.library.custom_op("attnrewrite::sea_decode", mutates_args=())
def sparse_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    position: Tensor | None,
    scale: float,
    window: int | None,
    budget: int,
    budget_rule: str,
    grouping: str,
) -> Tensor:
    """Return ``reference.sparse_attention`` of L queries among S keys, ``[B, H, L, Dv]`` in float32 (float64).

    ``padding`` ``[B, S]`` is False where a key is padding, or not there yet. ``position``, a number, says where the
    first query stands in a cache of fixed size; otherwise the queries are the newest keys.
    """
    rows, rule = _rows(query, key, padding, position, window), Rule(budget, budget_rule, grouping)
    bias = None if bias is None else four_dimensional(bias)
    with full_precision(query.device):
        return sparse_attention(query, key, value, estimated, rows, rule, bias=bias, scale=scale).contiguous()


def _rows(query: Tensor, key: Tensor, padding: Tensor | None, position: Tensor | None, window: int | None) -> Rows:
    return visible_rows(
        query.shape[2],
        key.shape[2],
        is_causal=True,
        window=window,
        padding=padding,
        device=query.device,
        first=None if position is None else position.to(query.device),
    )


@sparse_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]), dtype=accumulation_dtype(query.dtype))


@torch.library.custom_op("attnrewrite::sea_decode_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    position: Tensor | None,
    scale: float,
    window: int | None,
    budget: int,
    budget_rule: str,
    grouping: str,
) -> list[Tensor]:
    """Return the gradients of query, key, value and bias; an empty one where there is no bias."""
    rows, rule = _rows(query, key, padding, position, window), Rule(budget, budget_rule, grouping)
    dtype = accumulation_dtype(query.dtype)
    wide = None if bias is None else four_dimensional(bias)
    with full_precision(query.device):
        grad, estimated = rows.blank(grad.to(dtype)), rows.blank(estimated)
        inputs = (query.to(dtype), key.to(dtype), value.to(dtype))
        *found, by_bias, _ = sparse_gradients(
            grad, *inputs, estimated, rows, rule, wide, scale, torch.ones_like(grad[..., 0])
        )
    result = [x.to(like.dtype) for x, like in zip(found, (query, key, value), strict=True)]
    bias_like = query.new_empty(0) if bias is None or by_bias is None else by_bias.reshape(bias.shape).to(bias.dtype)
    return [*result, bias_like]


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, estimated: Tensor, bias: Tensor | None, *_: Any
) -> list[Tensor]:
    return [*map(torch.empty_like, (query, key, value)), query.new_empty(0) if bias is None else torch.empty_like(bias)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *found, by_bias = torch.ops.attnrewrite.sea_decode_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *found, None, by_bias if ctx.needs_input_grad[4] else None, *(None for _ in range(7))


sparse_step.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.attnrewrite.sea_decode)
def _flops(query: Any, key: Any, value: Any, *others: Any, **_: Any) -> int:
    return _pairs(query, key, others) * 2 * int(query[-1] + value[-1])


@register_flop_formula(torch.ops.attnrewrite.sea_decode_backward)
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *others: Any, **_: Any) -> int:
    return _pairs(query, key, others) * 2 * int(3 * query[-1] + 2 * value[-1])


def _pairs(query: Any, key: Any, others: tuple[Any, ...]) -> int:
    """Count the selected pairs: ``budget`` per query and head."""
    B, H, L = query[:3]
    return int(B * H * L * min(others[6], key[2]))
