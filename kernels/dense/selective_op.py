"""The operator ``attnrewrite::selective_kernels``: selective attention on generated kernels, whole or step by step."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.call import Call, options
from attnrewrite.kernels.dense.fallback import on_kernels
from attnrewrite.kernels.dense.launch import Wanted
from attnrewrite.kernels.dense.op import by_mask
from attnrewrite.kernels.dense.plain import plain_selective_backward, plain_selective_forward
from attnrewrite.kernels.dense.selective import Selection, selective_backward, selective_forward
from attnrewrite.kernels.dense.voter import Selector
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.selective.ballot import Ballot, selector


def selective_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    how: strips.Options,
    *,
    selection_head: int,
    protect_first: bool,
    votes: Tensor | None = None,
    protected: Tensor | None = None,
    position: Tensor | None = None,
    selector: Selector | None = None,
    recent: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the votes after each of the last ``recent`` queries ``[B, recent, S]``, the protected keys.

    ``votes`` and ``protected`` ``[B, S]`` are those before the first query, which stands at ``position``, or at the
    offset of ``how``. The caller has checked the arguments, which are those of ``selective_attention``.
    """
    B, S = query.shape[0], key.shape[2]
    before = torch.zeros(B, S, dtype=torch.float32, device=query.device) if votes is None else votes.float()
    exempt = _protected(query, key, attn_mask, how, selection_head, protected, position) if protect_first else protected
    if exempt is None:
        exempt = torch.zeros(1, S, dtype=torch.bool, device=query.device)
    numbers = (how.scale, how.dropout_p, how.is_causal, how.window, how.softcap, how.offset, selection_head, recent)
    added = (attn_mask, *(selector or (None, None)), how.sinks, how.slopes, exempt, position, seed)
    tensors = (query, key, value, gamma, before, *added)
    out, _, received = _forward(*tensors, *numbers)
    return out, received, exempt.expand(B, S)


def _protected(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    how: strips.Options,
    head: int,
    earlier: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """Return the keys on which nobody may vote, ``[B or 1, S]``: those that their own query sees first."""
    S = key.shape[2]
    if attn_mask is None and how.is_causal and position is None:
        protected = torch.zeros(1, S, dtype=torch.bool, device=key.device) if earlier is None else earlier
        return protected | (torch.arange(S, device=key.device) == 0) if how.offset == 0 else protected
    ballot = Ballot(how, head, how.offset if position is None else position)
    ballot.protect(query, key, attn_mask, earlier)
    assert ballot.protected is not None
    return ballot.protected


@torch.library.custom_op("attnrewrite::selective_kernels", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    votes: Tensor,
    attn_mask: Tensor | None,
    vote_query: Tensor | None,
    vote_key: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    protected: Tensor,
    position: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    offset: int,
    selection_head: int,
    recent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    how = options(scale, dropout_p, is_causal, window, softcap, sinks, alibi_slopes, offset)
    own = selector(vote_query, vote_key)
    call, who = _call(query, key, value, gamma, votes, attn_mask, own, protected, position, seed, how, selection_head)
    return on_kernels(
        call, lambda: selective_forward(call, who, recent), lambda: plain_selective_forward(call, who, recent)
    )


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, votes: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, L, _ = query.shape
    out = query.new_empty(B, H, L, value.shape[3])
    return out, votes.new_empty(B, H, L), votes.new_empty(B, rest[-1], key.shape[2])


@torch.library.custom_op("attnrewrite::selective_kernels_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    later: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    votes: Tensor,
    attn_mask: Tensor | None,
    vote_query: Tensor | None,
    vote_key: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    protected: Tensor,
    position: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    offset: int,
    selection_head: int,
    bias_needs_grad: bool,
    slopes_need_grad: bool,
) -> list[Tensor]:
    """Return the gradients by the first ten inputs of the operator, empty where there is none."""
    how = options(scale, dropout_p, is_causal, window, softcap, sinks, alibi_slopes, offset)
    own = selector(vote_query, vote_key)
    call, who = _call(query, key, value, gamma, votes, attn_mask, own, protected, position, seed, how, selection_head)
    wanted = Wanted(bias_needs_grad, slopes_need_grad)
    found = on_kernels(
        call,
        lambda: selective_backward(call, who, out, lse, upstream, later.contiguous(), wanted),
        lambda: plain_selective_backward(call, who, out, upstream, later, wanted),
        again=True,
    )
    dense, bias = found.dense, by_mask(found.dense.bias, attn_mask)
    by_selector = found.selector or (None, None)
    per_head = strips.as_given((dense.sinks, dense.slopes), (sinks, alibi_slopes), query)
    ordered = (dense.query, dense.key, dense.value, found.strength, found.earlier, bias, *by_selector, *per_head)
    return [query.new_empty(0) if x is None else x for x in ordered]


@_backward.register_fake
def _(upstream: Tensor, later: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    *first, mask, vote_query, vote_key, sinks, slopes = inputs[:10]
    wanted = Wanted(*inputs[-2:])
    given = (*first, mask if wanted.bias else None, vote_query, vote_key, sinks, slopes if wanted.slopes else None)
    return [out.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    votes: Tensor,
    attn_mask: Tensor | None,
    own: Selector | None,
    protected: Tensor,
    position: Tensor | None,
    seed: Tensor | None,
    how: strips.Options,
    selection_head: int,
) -> tuple[Call, Selection]:
    call = Call(query, key, value, how, attn_mask, strength=gamma, seed=seed)
    return call, Selection(selection_head, protected, votes.contiguous(), position, own)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *ctx.numbers, ctx.recent = inputs[13:]
    ctx.save_for_backward(*output[:2], *inputs[:13])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor, later: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.recent != 1:
        raise error("AR402", "only the votes after the last query have a gradient", hint="decode under torch.no_grad()")
    needs = ctx.needs_input_grad[:10]
    found = _backward(upstream, later.squeeze(1), *ctx.saved_tensors, *ctx.numbers, needs[5], needs[9])
    return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None for _ in range(11))


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_kernels)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    B, H, L, D = query
    return strips.flops(B, 1, L, key[2], _voting(D, rest[3])) + strips.flops(B, H, L, key[2], D + value[3])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_kernels_backward)
def _backward_flops(
    upstream: Any, later: Any, out: Any, lse: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any
) -> int:
    # The scores are made three times: by keys, by queries, and for the votes.
    B, H, L, D = query
    dense = strips.flops(B, H, L, key[2], 5 * D + 4 * value[3])
    return dense + strips.flops(B, 1, L, key[2], 4 * _voting(D, rest[3]))


def _voting(D: int, vote_query: Any) -> int:
    return D if vote_query is None else int(vote_query[2])
