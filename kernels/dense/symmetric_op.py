"""The operator ``attnrewrite::symmetric_kernels``: symmetric and pairwise attention on generated kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.call import options
from attnrewrite.kernels.dense.decode import decode, few
from attnrewrite.kernels.dense.fallback import on_kernels
from attnrewrite.kernels.dense.launch import Gradients, Wanted, backward, forward
from attnrewrite.kernels.dense.op import by_mask
from attnrewrite.kernels.dense.plain import plain_backward, plain_forward
from attnrewrite.kernels.dense.shared import backward_shared, paired, shares
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.symmetric.reference import through_pair


def symmetric_kernels(
    shared: Tensor, value: Tensor, pair: Tensor | None, attn_mask: Tensor | None, seed: Tensor | None, how: Options
) -> Tensor:
    """Compute ``symmetric_attention``. The caller has checked the arguments."""
    numbers = (how.scale, how.dropout_p, how.is_causal, how.window, how.softcap)
    out, _ = _forward(shared, value, pair, attn_mask, how.sinks, how.slopes, seed, *numbers)
    result: Tensor = out
    return result


@torch.library.custom_op("attnrewrite::symmetric_kernels", mutates_args=())
def _forward(
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    attn_mask: Tensor | None,
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
    given = (shared, value, pair, attn_mask, seed, how)
    call = paired(*given, on_chip=True)
    return on_kernels(call, lambda: (decode if few(call) else forward)(call), lambda: plain_forward(paired(*given)))


@_forward.register_fake
def _(shared: Tensor, value: Tensor, pair: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
    heads = shared.shape[1] if pair is None else pair.shape[0]
    out = shared.new_empty(shared.shape[0], heads, shared.shape[2], value.shape[3])
    return out, out.new_empty(out.shape[:3], dtype=torch.float32)


@torch.library.custom_op("attnrewrite::symmetric_kernels_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    out: Tensor,
    lse: Tensor,
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    attn_mask: Tensor | None,
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
    """Return the gradients by the first six inputs of the operator, empty where there is none."""
    how = options(scale, dropout_p, is_causal, window, softcap, sinks, alibi_slopes)
    call = paired(shared, value, pair, attn_mask, seed, how)
    wanted = Wanted(bias_needs_grad, slopes_need_grad)

    def on_gpu() -> Gradients:
        if shares(call):
            return backward_shared(call, out, lse, upstream)
        return backward(call, out, lse, upstream, wanted)[0]

    found = on_kernels(call, on_gpu, lambda: plain_backward(call, out, upstream, wanted), again=True)
    by_query, by_pair = found.query, shared.new_empty(0)
    if pair is not None:
        by_query, by_pair = through_pair(found.query.to(torch.float32), shared, pair)
    by_shared = (by_query + found.key).to(shared.dtype)
    bias = by_mask(found.bias, attn_mask)
    per_head = strips.as_given((found.sinks, found.slopes), (sinks, alibi_slopes), shared)
    return [by_shared, found.value, by_pair, shared.new_empty(0) if bias is None else bias, *per_head]


@_backward.register_fake
def _(
    upstream: Tensor,
    out: Tensor,
    lse: Tensor,
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    wanted = Wanted(*rest[-2:])
    given = (shared, value, pair, attn_mask if wanted.bias else None, sinks, alibi_slopes if wanted.slopes else None)
    return [shared.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.numbers = *inputs[:7], inputs[7:]
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:6]
    found = _backward(upstream, *ctx.saved_tensors, *ctx.numbers, needs[3], needs[5])
    return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None for _ in range(6))


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.symmetric_kernels)
def _flops(shared: Any, value: Any, pair: Any, *_: Any, **__: Any) -> int:
    H = shared[1] if pair is None else pair[0]
    products = strips.flops(shared[0], H, shared[2], shared[2], shared[3] + value[3])
    return products + (0 if pair is None else 2 * shared[0] * H * shared[2] * shared[3] ** 2)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.symmetric_kernels_backward)
def _backward_flops(upstream: Any, out: Any, lse: Any, shared: Any, value: Any, pair: Any, *_: Any, **__: Any) -> int:
    # As for any two tensors: fewer where a tile serves twice, which shapes do not tell.
    products = strips.flops(shared[0], upstream[1], shared[2], shared[2], 4 * shared[3] + 3 * value[3])
    return products + (0 if pair is None else 6 * shared[0] * upstream[1] * shared[2] * shared[3] ** 2)
