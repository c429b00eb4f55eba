"""The operator ``attnrewrite::selective_decode``: one step with a cache, and the closed-form backward of the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.choice import generated
from attnrewrite.kernels.dense.voter import unfit
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.selective.backward import gradients
from attnrewrite.kernels.selective.ballot import Ballot, attend, selector
from attnrewrite.kernels.selective.cost import backward_flops, forward_flops
from attnrewrite.kernels.selective.pruning import evicted
from attnrewrite.kernels.selective.reference import seen_by
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.visibility import accumulation_dtype, full_precision


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
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    recent: int = 1,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the votes after each of the last ``recent`` queries, ``[B, recent, S]``, the protected keys.

    ``votes`` and ``protected`` ``[B, S]`` have 0 and False for the new keys. ``position``, a number, says where the
    first query stands in a cache of fixed size, in which case ``attn_mask`` hides what lies behind; otherwise the
    queries are the newest keys. ``budget`` is a number, with which ``recent`` is 1; ``seed`` is what
    ``strips.draw_seed`` drew. ALiBi is for queries whose position is known.
    """
    reasons = [unfit(query, vote_query, vote_key)]
    if budget is not None and (position is not None or query.shape[2] != 1):
        reasons.append("a budget evicts keys row by row")
    if budget is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        reasons.append("which keys a budget evicts has no gradient")
    if generated(query, value, *reasons):
        from attnrewrite.kernels.dense.selective_op import selective_kernels  # defines an operator

        placed = position is not None
        how = Options(
            scale,
            not placed,
            None if placed else window,
            softcap,
            dropout_p=dropout_p,
            offset=0 if placed else key.shape[2] - query.shape[2],
            sinks=sinks,
            slopes=alibi_slopes,
        )
        if budget is not None:
            votes = _bounded(votes, protected if protect_first else None, attn_mask, how, selection_head, budget)
        return selective_kernels(
            query,
            key,
            value,
            gamma,
            attn_mask,
            seed,
            how,
            selection_head=selection_head,
            protect_first=protect_first,
            votes=votes,
            protected=protected,
            position=position,
            selector=selector(vote_query, vote_key),
            recent=recent,
        )
    found: tuple[Tensor, Tensor, Tensor] = _step(
        query,
        key,
        value,
        gamma,
        votes,
        protected,
        attn_mask,
        position,
        seed,
        budget,
        scale,
        dropout_p,
        window,
        softcap,
        selection_head,
        protect_first,
        vote_query,
        vote_key,
        recent,
        sinks,
        alibi_slopes,
    )
    return found


def _bounded(
    votes: Tensor, protected: Tensor | None, attn_mask: Tensor | None, how: Options, head: int, budget: Tensor
) -> Tensor:
    """Return the votes before the newest query, infinite for what a budget evicts."""
    S = votes.shape[1]
    cols = slice(0 if how.window is None else max(0, S - how.window), S)
    seen = seen_by(strips.seen(slice(0, 1), cols, attn_mask, how, votes.device), head)
    return evicted(votes, seen, protected, cols, budget.to(votes.device))


@torch.library.custom_op("attnrewrite::selective_decode", mutates_args=())
def _step(
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
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    recent: int = 1,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    how = strips.options(seed, scale, dropout_p, True, window, softcap, sinks=sinks, slopes=alibi_slopes)
    own = selector(vote_query, vote_key)
    ballot = _ballot(query, key, attn_mask, protected, position, how, selection_head, protect_first, own)
    limit = None if budget is None else int(budget)
    with full_precision(query.device):
        out, received = attend(query, key, value, gamma, attn_mask, ballot, votes, limit, recent)
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
    own: tuple[Tensor, Tensor] | None,
) -> Ballot:
    if position is None:
        offset = key.shape[2] - query.shape[2]
        ballot = Ballot(replace(how, offset=offset), selection_head, offset, own)
    else:
        ballot = Ballot(replace(how, is_causal=False, window=None), selection_head, position.to(query.device), own)
    if protect_first:
        ballot.protect(query, key, attn_mask, protected)
    return ballot


@_step.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, votes: Tensor, protected: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    recent = rest[12] if len(rest) > 12 else 1
    received = votes.new_empty(votes.shape[0], recent, votes.shape[1], dtype=accumulation_dtype(query.dtype))
    return query.new_empty(*query.shape[:3], value.shape[3]), received, torch.empty_like(protected)


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
    vote_query: Tensor | None,
    vote_key: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias_needs_grad: bool,
) -> list[Tensor]:
    """Return the gradients as the backward of a whole sequence does, and behind them that by votes."""
    how = strips.options(seed, scale, dropout_p, True, window, softcap, sinks=sinks, slopes=alibi_slopes)
    own = selector(vote_query, vote_key)
    ballot = _ballot(query, key, attn_mask, protected, position, how, selection_head, protect_first, own)
    with full_precision(query.device):
        found = gradients(
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
    return [*found.listed(), found.votes.to(votes.dtype)]


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
    *rest: Any,
) -> list[Tensor]:
    *added, bias_needs_grad = rest[-5:]
    given = (query, key, value, gamma, attn_mask if bias_needs_grad else None, *added, votes)
    return [query.new_empty(0) if x is None else torch.empty_like(x) for x in given]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, gamma, votes, protected, attn_mask, position, seed, budget, *rest = inputs
    *ctx.numbers, vote_query, vote_key, ctx.recent, sinks, slopes = rest
    ctx.bounded = budget is not None
    tensors = (query, key, value, gamma, output[0], votes, protected, attn_mask, position, seed)
    ctx.save_for_backward(*tensors, vote_query, vote_key, sinks, slopes)


def _differentiate(ctx: Any, upstream: Tensor, by_state: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if ctx.bounded:
        raise error("AR402", "which keys a budget evicts has no gradient", hint="decode under torch.no_grad()")
    if ctx.recent != 1:
        raise error("AR402", "only the votes after the last query have a gradient", hint="decode under torch.no_grad()")
    wants_bias = ctx.needs_input_grad[6]
    tensors, added = ctx.saved_tensors[:-4], ctx.saved_tensors[-4:]
    *found, by_votes = _backward(upstream, by_state.squeeze(1), *tensors, *ctx.numbers, *added, wants_bias)
    by_bias = found[4] if wants_bias else None
    by_added = [None if x is None else by for x, by in zip(added, found[5:], strict=True)]
    return *found[:4], by_votes, None, by_bias, *(None for _ in range(9)), *by_added[:2], None, *by_added[2:]


_step.register_autograd(_differentiate, setup_context=_remember)


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_decode)
def _flops(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return forward_flops(query, key, value, rest[13:])


@torch.utils.flop_counter.register_flop_formula(torch.ops.attnrewrite.selective_decode_backward)
def _backward_flops(upstream: Any, by_state: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> int:
    return backward_flops(query, key, value, rest[13:])
