"""Routing attention as a registered operator, with its shapes, its gradient and its cost.

Importing this file defines ``torch.ops.attnrewrite.routing_attention``; that takes a while, so reference.py does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.routing import reference
from attnrewrite.kernels.routing.attend import attend
from attnrewrite.kernels.routing.backward import routing_attention_backward
from attnrewrite.kernels.routing.prepare import Options, Routed, check_routing, prepare
from attnrewrite.kernels.routing.tiles import tiled
from attnrewrite.kernels.visibility import check_attention, full_precision


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    rule: str = "argmax_window",
    window_size: int | None = None,
    shared_qk: bool = False,
    logits: str = "raw",
    center_query: Tensor | None = None,
    center_key: Tensor | None = None,
    routing_query: Tensor | None = None,
    routing_key: Tensor | None = None,
    valid: Tensor | None = None,
    key_cluster: Tensor | None = None,
    position: Tensor | None = None,
    paper_causal: bool = False,
) -> Tensor:
    """Compute ``reference.routing_attention``: by the operator where it has the options, else by the reference."""
    bias_learns = attn_mask is not None and attn_mask.requires_grad
    options: dict[str, Any] = {
        "rule": rule,
        "window_size": window_size,
        "shared_qk": shared_qk,
        "logits": logits,
        "center_query": center_query,
        "center_key": center_key,
        "routing_query": routing_query,
        "routing_key": routing_key,
        "valid": valid,
        "key_cluster": key_cluster,
        "position": position,
        "paper_causal": paper_causal,
        "is_causal": is_causal,
        "scale": scale,
        "window": window,
    }
    if dropout_p != 0.0 or bias_learns:
        options |= {"dropout_p": dropout_p, "enable_gqa": enable_gqa}
        return reference.routing_attention(query, key, value, centroids, attn_mask, **options)
    check_attention(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, window=window)
    out: Tensor = routing_attention_op(query, key, value, centroids, attn_mask, **options)
    return out


routing_attention.__doc__ = reference.routing_attention.__doc__

TENSORS = len(Routed._fields)
"""How many arguments, the first ones of both operators, are tensors."""


@torch.library.custom_op("attnrewrite::routing_attention", mutates_args=())
def routing_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    attn_mask: Tensor | None = None,
    center_query: Tensor | None = None,
    center_key: Tensor | None = None,
    routing_query: Tensor | None = None,
    routing_key: Tensor | None = None,
    valid: Tensor | None = None,
    key_cluster: Tensor | None = None,
    position: Tensor | None = None,
    rule: str = "argmax_window",
    window_size: int | None = None,
    shared_qk: bool = False,
    logits: str = "raw",
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    paper_causal: bool = False,
) -> Tensor:
    """Compute ``routing_attention`` without dropout; Hkv < H needs no ``enable_gqa``.

    Differentiable in query, key and value, once. Windows are scored in tiles, so that a sum may round otherwise
    than in ``routing_attention``, and a NaN reaches all queries of its tile.

    Raises:
        LoweringError: AR402, arguments that do not fit together, or an ``attn_mask`` that requires a gradient.
    """
    routed = Routed(
        query,
        key,
        value,
        centroids,
        attn_mask,
        center_query,
        center_key,
        routing_query,
        routing_key,
        valid,
        key_cluster,
        position,
    )
    options = Options(rule, window_size, shared_qk, logits, is_causal, scale, window, paper_causal)
    check_attention(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=True, window=window)
    check_routing(routed, options)
    with full_precision(query.device):
        scored, selection = prepare(routed, options)
        return attend(scored, tiled(selection)).to(query.dtype)


@torch.library.custom_op("attnrewrite::routing_attention_backward", mutates_args=())
def routing_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    attn_mask: Tensor | None = None,
    center_query: Tensor | None = None,
    center_key: Tensor | None = None,
    routing_query: Tensor | None = None,
    routing_key: Tensor | None = None,
    valid: Tensor | None = None,
    key_cluster: Tensor | None = None,
    position: Tensor | None = None,
    rule: str = "argmax_window",
    window_size: int | None = None,
    shared_qk: bool = False,
    logits: str = "raw",
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    paper_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output."""
    routed = Routed(
        query,
        key,
        value,
        centroids,
        attn_mask,
        center_query,
        center_key,
        routing_query,
        routing_key,
        valid,
        key_cluster,
        position,
    )
    options = Options(rule, window_size, shared_qk, logits, is_causal, scale, window, paper_causal)
    return routing_attention_backward(grad, routed, options)


@routing_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@routing_attention_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if ctx.needs_input_grad[Routed._fields.index("attn_mask")]:
        raise error(
            "AR402",
            "attn_mask requires a gradient, which this operator does not compute",
            hint="call attnrewrite.functional.routing_attention, or detach the mask",
        )
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = routing_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*found, *(None,) * (TENSORS - len(found) + len(ctx.options)))


routing_attention_op.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.attnrewrite.routing_attention)
def _flops(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    routing, (D, Dv), pairs = _work(shapes, options)
    return 2 * (routing + pairs * (D + Dv))


@register_flop_formula(torch.ops.attnrewrite.routing_attention_backward)
def _backward_flops(grad_shape: Any, *shapes: Any, out_shape: Any = None, **options: Any) -> int:
    """Routing and logits again, then the gradients of weights, values, queries and keys."""
    routing, (D, Dv), pairs = _work(shapes, options)
    return 2 * (routing + pairs * (3 * D + 2 * Dv))


def _work(shapes: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, tuple[int, int], int]:
    """Return multiplications of the affinities, head dims, and scored pairs."""
    (B, H, L, D), (_, Hkv, S, _), (*_, Dv), (_, C, _) = shapes[:4]
    chosen = Options(**{**dict(zip(Options._fields, shapes[TENSORS:], strict=False)), **_only_options(options)})
    tokens = B * H * L + (0 if chosen.shared_qk else B * Hkv * S)
    asked, offered = (min(chosen.window_size or -(-N // C), N) for N in (L, S))
    if chosen.rule == "topw":
        return tokens * C * D, (D, Dv), B * H * C * asked * offered
    return tokens * C * D, (D, Dv), B * H * L * (offered + (not chosen.shared_qk))


def _only_options(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in Options._fields}
