"""SEA attention as an operator: one node in every graph, with the closed-form gradient and a FLOP formula.

Importing this module defines ``torch.ops.attnrewrite.sea_attention`` and its backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnrewrite.kernels.sea import reference
from attnrewrite.kernels.sea.backward import sea_gradients
from attnrewrite.kernels.sea.slices import Rule
from attnrewrite.kernels.visibility import check_attention

NAME = "attnrewrite::sea_attention"


def sea_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    budget: int,
    budget_rule: str = "exact",
    grouping: str = "causal_per_batch",
    scale_prob: Tensor | None = None,
    mix: Tensor | None = None,
    strict_window: bool = True,
    padding: Tensor | None = None,
    pooling: str = "width",
) -> Tensor:
    """Compute ``reference.sea_attention``: by the operator where it has the options, else by the reference."""
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": scale,
        "window": window,
        "budget": budget,
        "budget_rule": budget_rule,
        "grouping": grouping,
        "scale_prob": scale_prob,
        "mix": mix,
        "padding": padding,
        "pooling": pooling,
    }
    if dropout_p != 0.0 or (window is not None and strict_window):
        options |= {"dropout_p": dropout_p, "enable_gqa": enable_gqa, "strict_window": strict_window}
        return reference.sea_attention(query, key, value, estimated, attn_mask, **options)
    check_attention(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, window=window)
    out: Tensor = sea_attention_op(query, key, value, estimated, attn_mask, **options)
    return out


sea_attention.__doc__ = reference.sea_attention.__doc__


@torch.library.custom_op(NAME, mutates_args=())
def sea_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    budget: int,
    budget_rule: str,
    grouping: str,
    scale_prob: Tensor | None,
    mix: Tensor | None,
    padding: Tensor | None = None,
    pooling: str = "width",
) -> Tensor:
    """Compute ``reference.sea_attention`` without dropout; a window is not refused here."""
    return reference.sea_attention(
        query,
        key,
        value,
        estimated,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
        window=window,
        budget=budget,
        budget_rule=budget_rule,
        grouping=grouping,
        scale_prob=scale_prob,
        mix=mix,
        strict_window=False,
        padding=padding,
        pooling=pooling,
    ).contiguous()


@sea_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_others: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]))


@torch.library.custom_op(f"{NAME}_backward", mutates_args=())
def sea_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    budget: int,
    budget_rule: str,
    grouping: str,
    scale_prob: Tensor | None,
    mix: Tensor | None,
    padding: Tensor | None = None,
    pooling: str = "width",
) -> list[Tensor]:
    """Return the gradients of query, key, value, estimated, attn_mask, scale_prob and mix.

    Zeros where there is none, and an empty tensor where the input is absent or boolean.
    """
    found = sea_gradients(
        grad,
        query,
        key,
        value,
        estimated,
        attn_mask,
        is_causal,
        scale,
        window,
        rule=Rule(budget, budget_rule, grouping),
        scale_prob=scale_prob,
        mix=mix,
        padding=padding,
        pooling=pooling,
    )
    inputs = (query, key, value, estimated, attn_mask, scale_prob, mix)
    return [
        _like(tensor, query) if gradient is None else gradient.contiguous()
        for tensor, gradient in zip(inputs, found, strict=True)
    ]


@sea_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    budget: int,
    budget_rule: str,
    grouping: str,
    scale_prob: Tensor | None,
    mix: Tensor | None,
    padding: Tensor | None = None,
    pooling: str = "width",
) -> list[Tensor]:
    return [_like(tensor, query) for tensor in (query, key, value, estimated, attn_mask, scale_prob, mix)]


def _like(tensor: Tensor | None, query: Tensor) -> Tensor:
    if tensor is None or not tensor.is_floating_point():
        return query.new_empty(0)
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


_TENSORS = (0, 1, 2, 3, 4, 11, 12)  # where the operator takes tensors that may have a gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(inputs[at] for at in _TENSORS), inputs[13])
    ctx.options, ctx.pooling = inputs[5:11], inputs[14]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, estimated, attn_mask, scale_prob, mix, padding = ctx.saved_tensors
    found = torch.ops.attnrewrite.sea_attention_backward(
        grad, query, key, value, estimated, attn_mask, *ctx.options, scale_prob, mix, padding, ctx.pooling
    )
    result: list[Tensor | None] = [None] * 15
    for at, gradient in zip(_TENSORS, found, strict=True):
        result[at] = gradient if ctx.needs_input_grad[at] else None
    return tuple(result)


sea_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _pairs(query: tuple[int, ...], is_causal: bool, window: int | None, budget: int) -> int:
    """Count the selected pairs: ``budget`` per query and head, fewer where fewer keys are seen."""
    B, H, L = query[:3]
    if not is_causal:
        return B * H * L * min(budget, L)
    kept = min(budget, L if window is None else window)
    full = max(L - kept, 0)
    short = L - full
    return B * H * (full * kept + short * (short + 1) // 2)


@register_flop_formula(torch.ops.attnrewrite.sea_attention)
def _forward_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    estimated: tuple[int, ...],
    attn_mask: tuple[int, ...] | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    budget: int,
    *_others: Any,
    **_shapes: Any,
) -> int:
    """Count scores and weighted values."""
    return _pairs(query, is_causal, window, budget) * 2 * (query[-1] + value[-1])


@register_flop_formula(torch.ops.attnrewrite.sea_attention_backward)
def _backward_flops(
    grad: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    estimated: tuple[int, ...],
    attn_mask: tuple[int, ...] | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    budget: int,
    *_others: Any,
    **_shapes: Any,
) -> int:
    """Count scores again, and the gradients of weights, query, key and value."""
    return _pairs(query, is_causal, window, budget) * 2 * (3 * query[-1] + 2 * value[-1])
