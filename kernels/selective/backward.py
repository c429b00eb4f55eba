"""The closed-form backward of selective attention, strip by strip, from the last to the first.

Forward carries the votes that every key has received from one strip to the next. Backward goes the other way: with
dL' the gradient by the penalised logits and G = Σ_h dL',

    dF = -γ G      dZ[k,j] = Σ_{i>k} dF[i,j] where k may vote on j and Z[k,j] > 0      dγ = -Σ G∘F

so it carries the sum of dF over later queries. The votes that forward returns begin that sum, and what is left of it at
the first query is the gradient by the votes that forward started from. The states of forward are computed anew, from
the selection head alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.selective.ballot import Ballot
from attnrewrite.kernels.strips import Gradients
from attnrewrite.kernels.visibility import accumulation_dtype


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by query, key, value, gamma, bias and ``votes`` ``[B, S]``; an empty one without a bias.

    ``by_state`` ``[B, S]`` is the gradient by the votes that forward returned; None if nothing was done with them.
    """
    (B, H, L, _), S, how = query.shape, key.shape[2], ballot.how
    dtype = accumulation_dtype(query.dtype)
    q, k, v, g, strength = (x.to(dtype) for x in (query, key, value, upstream, gamma))
    delta = (g * out.to(dtype)).sum(-1, keepdim=True)  # [B, H, L, 1]
    total = Gradients.zeros(q, k, v, attn_mask if bias_needs_grad else None)
    spans = list(strips.spans(B, H, L, S, how))
    states = list(ballot.states(q, k, attn_mask, spans, votes))
    later = q.new_zeros(B, S) if by_state is None else by_state.to(dtype, copy=True)
    by_gamma = q.new_zeros(())
    for rows, cols in reversed(spans):
        part = strips.strip(q, k, attn_mask, how, rows, cols)
        own = part.logits[:, ballot.head]
        penalty = ballot.penalty(part, own, states.pop())
        weights = masked_softmax(part.logits - strength * penalty.unsqueeze(1), part.seen)
        by_logit = total.through_weights(part, weights, g, v, delta, how)
        summed = by_logit.sum(1)  # [B, rows, cols]
        by_gamma -= (summed * penalty).sum()
        by_penalty = -strength * summed
        whole = by_penalty.sum(1)
        after = later[:, None, cols] + whole.unsqueeze(1) - torch.cumsum(by_penalty, dim=1)
        later[:, cols] += whole
        by_logit[:, ballot.head] += torch.where(ballot.may_vote(part) & (own > 0), after, 0.0)
        total.add_scores(part, by_logit, q, k, how)
    by_bias = query.new_empty(0) if total.bias is None or attn_mask is None else total.bias.to(attn_mask.dtype)
    by_query, by_key, by_value = total.query.to(query.dtype), total.key.to(key.dtype), total.value.to(value.dtype)
    return by_query, by_key, by_value, by_gamma.to(gamma.dtype), by_bias, later
