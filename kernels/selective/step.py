"""The operator ``attnrewrite::selective_decode``: one step with a cache, and the closed-form backward of the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.selective.backward import gradients
from attnrewrite.kernels.selective.ballot import Ballot, attend
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.visibility import full_precision


@torch.library.custom_op("attnrewrite::selective_decode", mutates_args=())
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    votes: Tensor,
    protected: Tensor,
    attn_mask: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
    budget: Tensor | None,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
    selection_head: int,
    protect_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the votes and the protected keys after L queries.

    ``votes`` and ``protected`` ``[B, S]`` have 0 and False for the new keys. ``position``, a number, says where the
    first query stands in a cache of fixed size, in which case ``attn_mask`` hides what lies behind; otherwise the
    queries are the newest keys. ``budget`` is a number, ``seed`` what ``strips.draw_seed`` drew.
    """
    how = strips.options(seed, scale, dropout_p, True, window, softcap)
    ballot = _ballot(query, key, attn_mask, protected, position, how, selection_head, protect_first)
    limit = None if budget is None else int(budget)
    with full_precision(query.device):
        out, received = attend(query, key, value, gamma, attn_mask, ballot, votes, limit)
    exempt = protected if ballot.protected is None else ballot.protected
    return out, received, exempt.expand_as(protected).clone()


def _ballot(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    protected: Tensor,
    position: Tensor | None,
    how: Options,
    selection_head: int,
    protect_first: bool,
) -> Ballot:
    if position is None:
        offset = key.shape[2] - query.shape[2]
        ballot = Ballot(replace(how, offset=offset), selection_head, offset)
    else:
        ballot = Ballot(replace(how, is_causal=False, window=None), selection_head, position.to(query.device))
    if protect_first:
        ballot.protect(query, key, attn_mask, protected)
    return ballot


@step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, votes: Tensor, protected: Tensor, *rest: object) -> Any:
    return query.new_empty(*query.shape[:3], value.shape[3]), torch.empty_like(votes), torch.empty_like(protected)


@torch.library.custom_op("attnrewrite::selective_decode_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    by_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    out: Tensor,
    votes: Tensor,
    protected: Tensor,
    attn_mask: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
    selection_head: int,
    protect_first: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by query, key, value, gamma, bias and votes; an empty one where there is no bias."""
    how = strips.options(seed, scale, dropout_p, True, window, softcap)
    ballot = _ballot(query, key, attn_mask, protected, position, how, selection_head, protect_first)
    with full_precision(query.device):
        return gradients(
            upstream,
            by_state,
            query,
            key,
            value,
            gamma,
            out,
            attn_mask,
            ballot,
            votes,
            bias_needs_grad=bias_needs_grad,
        )


@_backward.register_fake
def _(
    upstream: Tensor,
    by_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    out: Tensor,
    votes: Tensor,
    protected: Tensor,
    attn_mask: Tensor | None,
    *rest: object,
) -> tuple[Tensor, ...]:
    bias = query.new_empty(0) if attn_mask is None or not rest[-1] else torch.empty_like(attn_mask)
    return (*(torch.empty_like(x) for x in (query, key, value, gamma)), bias, torch.empty_like(votes))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, gamma, votes, protected, attn_mask, position, seed, budget, *ctx.numbers = inputs
    ctx.bounded = budget is not None
    ctx.save_for_backward(query, key, value, gamma, output[0], votes, protected, attn_mask, position, seed)


def _differentiate(ctx: Any, upstream: Tensor, by_state: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if ctx.bounded:
        raise error("AR402", "which keys a budget evicts has no gradient", hint="decode under torch.no_grad()")
    wants_bias = ctx.needs_input_grad[6]
    *found, by_bias, by_votes = _backward(upstream, by_state, *ctx.saved_tensors, *ctx.numbers, wants_bias)
    return *found, by_votes, None, by_bias if wants_bias else None, *(None for _ in range(10))


step.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_decode)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return strips.flops(query[0], query[1], query[2], key[2], query[3] + value[3])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_decode_backward)
def _backward_flops(upstream: Any, by_state: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    whole = strips.flops(query[0], query[1], query[2], key[2], 3 * query[3] + 2 * value[3])
    return whole + strips.flops(query[0], 1, query[2], key[2], query[3])
