"""The operator ``attnrewrite::dense_attention``: plain, SSA and selective attention on generated kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.launch import Gradients, backward, forward
from attnrewrite.kernels.dense.selective import Selection, selective_backward, selective_forward
from attnrewrite.kernels.selective.ballot import Ballot


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    *,
    query_temperature: Tensor | None = None,
    value_temperature: Tensor | None = None,
    gamma: Tensor | None = None,
    selection_head: int = 0,
    protect_first: bool = True,
) -> Tensor:
    """Compute attention ``[B, H, L, Dv]``, with temperatures those of SSA, with ``gamma`` that of selective attention.

    The arguments are those of ``ssa_attention`` and ``selective_attention``, checked by the caller.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    seed = strips.draw_seed(query, dropout_p)
    numbers = (factor, dropout_p, is_causal, window, softcap, selection_head, protect_first)
    out, _ = _forward(query, key, value, attn_mask, query_temperature, value_temperature, gamma, seed, *numbers)
    result: Tensor = out
    return result


@torch.library.custom_op("attnrewrite::dense_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    query_temperature: Tensor | None,
    value_temperature: Tensor | None,
    gamma: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    selection_head: int,
    protect_first: bool,
) -> tuple[Tensor, Tensor]:
    how = strips.Options(scale, is_causal, window, softcap, dropout_p=dropout_p)
    call = _call(query, key, value, how, attn_mask, query_temperature, value_temperature, gamma, seed)
    if gamma is None:
        return forward(call)
    return selective_forward(call, _selection(call, selection_head, protect_first))


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("attnrewrite::dense_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    query_temperature: Tensor | None,
    value_temperature: Tensor | None,
    gamma: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    selection_head: int,
    protect_first: bool,
    bias_needs_grad: bool,
) -> list[Tensor]:
    """Return the gradients by the first seven inputs of the operator, empty where there is none."""
    how = strips.Options(scale, is_causal, window, softcap, dropout_p=dropout_p)
    call = _call(query, key, value, how, attn_mask, query_temperature, value_temperature, gamma, seed)
    by_gamma = None
    if gamma is None:
        found, _ = backward(call, out, lse, upstream, bias_gradient=bias_needs_grad)
    else:
        who = _selection(call, selection_head, protect_first)
        found, by_gamma = selective_backward(call, who, out, lse, upstream)
    if query_temperature is not None and value_temperature is not None:
        assert found.query_temperature is not None
        assert found.value_temperature is not None
        found.query_temperature = found.query_temperature.to(query_temperature.dtype)
        found.value_temperature = found.value_temperature.to(value_temperature.dtype)
    return [query.new_empty(0) if x is None else x for x in _ordered(found, attn_mask, by_gamma)]


@_backward.register_fake
def _(upstream: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    query, key, value, mask, *rest = inputs[:7]
    mask = mask if inputs[-1] else None
    given = (query, key, value, mask, *rest)
    return [query.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: strips.Options,
    attn_mask: Tensor | None,
    query_temperature: Tensor | None,
    value_temperature: Tensor | None,
    gamma: Tensor | None,
    seed: Tensor | None,
) -> Call:
    return Call(
        query,
        key,
        value,
        how,
        attn_mask,
        strength=gamma,
        query_temperature=None if query_temperature is None else query_temperature.contiguous(),
        value_temperature=None if value_temperature is None else value_temperature.contiguous(),
        seed=seed,
    )


def _selection(call: Call, head: int, protect_first: bool) -> Selection:
    """Say on which keys nobody may vote."""
    protected = torch.zeros(1, call.key.shape[2], dtype=torch.bool, device=call.key.device)
    if protect_first and call.mask is None and call.how.is_causal:
        protected[:, :1] = True
    elif protect_first:
        ballot = Ballot(call.how, head)
        ballot.protect(call.query, call.key, call.mask)
        assert ballot.protected is not None
        protected = ballot.protected
    return Selection(head, protected)


def _ordered(found: Gradients, attn_mask: Tensor | None, by_gamma: Tensor | None) -> list[Tensor | None]:
    bias = None
    if found.bias is not None and attn_mask is not None:
        bias = found.bias.sum_to_size(attn_mask[(None,) * (4 - attn_mask.dim())].shape)
        bias = bias.view(attn_mask.shape).to(attn_mask.dtype)
    return [found.query, found.key, found.value, bias, found.query_temperature, found.value_temperature, by_gamma]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[8:]
    ctx.save_for_backward(*output, *inputs[:8])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(upstream, *ctx.saved_tensors, *ctx.numbers, ctx.needs_input_grad[3])
    given = [x if needed else None for x, needed in zip(found, ctx.needs_input_grad[:7], strict=True)]
    return *given, *(None for _ in range(8))


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.dense_attention)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    B, H, L, D = query
    votes = 0 if rest[3] is None else strips.flops(B, 1, L, key[2], D)
    return votes + strips.flops(B, H, L, key[2], D + value[3])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.dense_attention_backward)
def _backward_flops(upstream: Any, out: Any, lse: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    B, H, L, D = query
    both = strips.flops(B, H, L, key[2], 4 * D + 3 * value[3])  # the scores are made twice: by keys and by queries
    votes = 0 if rest[3] is None else strips.flops(B, H, L, key[2], D + value[3]) + strips.flops(B, 1, L, key[2], 4 * D)
    return both + votes
