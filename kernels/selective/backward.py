"""The closed-form backward of selective attention, strip by strip, from the last to the first.

Forward carries the votes that every key has received from one strip to the next. Backward goes the other way: with
dL' the gradient by the penalised logits and G = Σ_h dL',

    dF = -γ G      dZ[k,j] = Σ_{i>k} dF[i,j] where k may vote on j and Z[k,j] > 0      dγ = -Σ G∘F

so it carries the sum of dF over later queries. The votes that forward returns begin that sum, and what is left of it at
the first query is the gradient by the votes that forward started from. The states of forward are computed anew, from
the selection head alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.selective.ballot import Ballot, lessened
from attnrewrite.kernels.strips import Gradients
from attnrewrite.kernels.visibility import accumulation_dtype


@dataclass
class Found:
    """Gradients by what forward was given, in its dtypes; None for what it was not given.

    ``votes`` ``[B, S]`` is the gradient by the votes that forward started from.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gamma: Tensor
    votes: Tensor
    bias: Tensor | None = None
    selector: tuple[Tensor, Tensor] | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    def listed(self) -> list[Tensor]:
        """Return those by query, key, value, gamma, bias, both of a selector, sinks and slopes; empty ones for None."""
        own = self.selector or (None, None)
        given = (self.query, self.key, self.value, self.gamma, self.bias, *own, self.sinks, self.slopes)
        return [self.query.new_empty(0) if x is None else x for x in given]


def gradients(
    upstream: Tensor,
    by_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    ballot: Ballot,
    votes: Tensor | None = None,
    *,
    bias_needs_grad: bool = False,
) -> Found:
    """Return the gradients of ``sum(upstream * out)``, with a bias only where ``bias_needs_grad``.

    ``by_state`` ``[B, S]`` is the gradient by the votes that forward returned; None if nothing was done with them.
    """
    (B, H, L, _), S, how = query.shape, key.shape[2], ballot.how
    dtype = accumulation_dtype(query.dtype)
    q, k, v, g, strength = (x.to(dtype) for x in (query, key, value, upstream, gamma))
    delta = (g * out.to(dtype)).sum(-1, keepdim=True)  # [B, H, L, 1]
    total = Gradients.zeros(q, k, v, attn_mask if bias_needs_grad else None, how)
    voter = ballot.voter(q, k, attn_mask)
    by_voter = Gradients.zeros(voter.query, voter.key, voter.key, None, voter.how)
    spans = list(strips.spans(B, H, L, S, how))
    states = list(ballot.states(voter, spans, votes))
    later = q.new_zeros(B, S) if by_state is None else by_state.to(dtype, copy=True)
    by_gamma = q.new_zeros(())
    for rows, cols in reversed(spans):
        part = strips.strip(q, k, attn_mask, how, rows, cols)
        own = ballot.logits(part, voter)
        penalty = ballot.penalty(part, own, states.pop())
        by_logit = total.through_weights(part, lessened(part.logits, penalty, strength), g, v, delta, how)
        summed = by_logit.sum(1)  # [B, rows, cols]
        by_gamma -= torch.where(summed == 0, 0.0, summed * penalty).sum()  # infinite where a key was evicted
        by_vote = ballot.by_logits(part, own, -strength * summed, later)
        if ballot.selector is None:
            by_logit[:, ballot.head] += by_vote
        else:
            by_voter.add_scores(replace(part, slope=None), by_vote.unsqueeze(1), voter.query, voter.key, voter.how)
        total.add_scores(part, by_logit, q, k, how)
    found = Found(
        total.query.to(query.dtype),
        total.key.to(key.dtype),
        total.value.to(value.dtype),
        by_gamma.to(gamma.dtype),
        later,
    )
    if total.bias is not None and attn_mask is not None:
        found.bias = total.bias.to(attn_mask.dtype)
    if how.sinks is not None and total.sinks is not None:
        found.sinks = total.sinks.to(how.sinks.dtype)
    if how.slopes is not None and total.slopes is not None:
        found.slopes = total.slopes.to(how.slopes.dtype)
    if ballot.selector is not None:
        both = zip((by_voter.query, by_voter.key), ballot.selector, strict=True)
        by_vote_query, by_vote_key = (by.squeeze(1).to(given.dtype) for by, given in both)
        found.selector = by_vote_query, by_vote_key
    return found
