"""The operator ``attnrewrite::dense_attention``: plain attention and SSA on generated kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.call import Call, options
from attnrewrite.kernels.dense.decode import decode, few
from attnrewrite.kernels.dense.fallback import on_kernels
from attnrewrite.kernels.dense.launch import Wanted, backward, forward
from attnrewrite.kernels.dense.plain import plain_backward, plain_forward


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
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Compute attention ``[B, H, L, Dv]``, with temperatures those of SSA.

    The arguments are those of ``attention`` and ``ssa_attention``, checked by the caller.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    seed = strips.draw_seed(query, dropout_p)
    numbers = (factor, dropout_p, is_causal, window, softcap)
    given = (attn_mask, query_temperature, value_temperature, sinks, alibi_slopes, seed)
    out, _ = _forward(query, key, value, *given, *numbers)
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
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    how = options(scale, dropout_p, is_causal, window, softcap, sinks, alibi_slopes)
    call = _call(query, key, value, how, attn_mask, query_temperature, value_temperature, seed)
    return on_kernels(call, lambda: (decode if few(call) else forward)(call), lambda: plain_forward(call))


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
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    bias_needs_grad: bool,
    slopes_need_grad: bool,
) -> list[Tensor]:
    """Return the gradients by the first eight inputs of the operator, empty where there is none."""
    how = options(scale, dropout_p, is_causal, window, softcap, sinks, alibi_slopes)
    call = _call(query, key, value, how, attn_mask, query_temperature, value_temperature, seed)

    wanted = Wanted(bias_needs_grad, slopes_need_grad)
    found = on_kernels(
        call,
        lambda: backward(call, out, lse, upstream, wanted)[0],
        lambda: plain_backward(call, out, upstream, wanted),
        again=True,
    )
    if query_temperature is not None and value_temperature is not None:
        assert found.query_temperature is not None
        assert found.value_temperature is not None
        found.query_temperature = found.query_temperature.to(query_temperature.dtype)
        found.value_temperature = found.value_temperature.to(value_temperature.dtype)
    bias = by_mask(found.bias, attn_mask)
    per_head = strips.as_given((found.sinks, found.slopes), (sinks, alibi_slopes), query)
    ordered = (found.query, found.key, found.value, bias, found.query_temperature, found.value_temperature, *per_head)
    return [query.new_empty(0) if x is None else x for x in ordered]


@_backward.register_fake
def _(upstream: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    query, key, value, mask, *rest, slopes = inputs[:8]
    wanted = Wanted(*inputs[-2:])
    given = (query, key, value, mask if wanted.bias else None, *rest, slopes if wanted.slopes else None)
    return [query.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: strips.Options,
    attn_mask: Tensor | None,
    query_temperature: Tensor | None,
    value_temperature: Tensor | None,
    seed: Tensor | None,
) -> Call:
    return Call(
        query,
        key,
        value,
        how,
        attn_mask,
        query_temperature=None if query_temperature is None else query_temperature.contiguous(),
        value_temperature=None if value_temperature is None else value_temperature.contiguous(),
        seed=seed,
    )


def by_mask(bias: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """Sum the gradient by a bias of every pair ``[B, H, L, S]`` to what the mask was broadcast from."""
    if bias is None or attn_mask is None:
        return None
    return bias.sum_to_size(attn_mask[(None,) * (4 - attn_mask.dim())].shape).view(attn_mask.shape).to(attn_mask.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[9:]
    ctx.save_for_backward(*output, *inputs[:9])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:8]
    found = _backward(upstream, *ctx.saved_tensors, *ctx.numbers, needs[3], needs[7])
    return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None for _ in range(6))


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.dense_attention)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return strips.flops(query[0], query[1], query[2], key[2], query[3] + value[3])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.dense_attention_backward)
def _backward_flops(upstream: Any, out: Any, lse: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    # The scores are made twice: by keys and by queries.
    return strips.flops(query[0], query[1], query[2], key[2], 4 * query[3] + 3 * value[3])
