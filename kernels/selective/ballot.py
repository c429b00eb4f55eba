"""The votes of selective attention in strips of queries: who may vote, what they sum up to, what they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.selective.pruning import survivors
from attnrewrite.kernels.selective.reference import seen_by
from attnrewrite.kernels.strips import Options, Strip
from attnrewrite.kernels.visibility import accumulation_dtype, four_dimensional


@dataclass
class Ballot:
    """Who may vote on whom, and what the votes sum up to.

    ``position`` is where the first query stands among the keys; ``protected`` is ``[B or 1, S]``: keys on which nobody
    may vote; None if there are none.
    """

    how: Options
    head: int
    position: int | Tensor = 0
    protected: Tensor | None = None

    def protect(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, earlier: Tensor | None = None) -> None:
        """Protect the keys ``earlier`` ``[B, S]``, and those of the queries' own that their query sees first."""
        (B, H, L, _), S = query.shape, key.shape[2]
        batch = 1 if attn_mask is None else four_dimensional(attn_mask).shape[0]
        protected = torch.zeros(batch, S, dtype=torch.bool, device=query.device)
        protected = protected if earlier is None else protected | earlier
        for rows, cols in strips.spans(B, H, L, S, self.how):
            seen = seen_by(strips.seen(rows, cols, attn_mask, self.how, query.device), self.head)
            behind = strips.lag(rows, cols, self.position, query.device)
            seen = torch.ones_like(behind, dtype=torch.bool).unsqueeze(0) if seen is None else seen
            first = (seen & (behind == 0)).any(-1) & ~(seen & (behind > 0)).any(-1)  # [B or 1, rows]
            protected[:, cols] |= ((behind == 0) & first.unsqueeze(-1)).any(1)
        self.protected = protected

    def may_vote(self, part: Strip) -> Tensor:
        """Return ``[B or 1, rows, cols]``."""
        other = strips.lag(part.rows, part.cols, self.position, part.logits.device) != 0
        seen = seen_by(part.seen, self.head)
        allowed = other.unsqueeze(0) if seen is None else seen & other
        return allowed if self.protected is None else allowed & ~self.protected[:, None, part.cols]

    def penalty(self, part: Strip, logits: Tensor, state: Tensor) -> Tensor:
        """Return the penalty ``[B, rows, cols]`` of a strip, and add its votes to ``state`` ``[B, S]``."""
        votes = torch.where(self.may_vote(part), torch.relu(logits), 0.0)
        received = torch.cumsum(votes, dim=1)
        # Shifted by a row rather than less the row's own votes: F[j+1, j] must be 0 without rounding.
        before = torch.cat((torch.zeros_like(received[:, :1]), received[:, :-1]), dim=1)
        penalty = before + state[:, None, part.cols]
        state[:, part.cols] += received[:, -1]
        return penalty

    def states(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None,
        spans: list[tuple[slice, slice]],
        votes: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the state ``[B, S]`` before each strip: ``votes``, and what the selection head adds to them."""
        group = query.shape[1] // key.shape[1]
        one, its_key = query[:, self.head : self.head + 1], key[:, self.head // group : self.head // group + 1]
        mask = None if attn_mask is None else strips.one_head(attn_mask, self.head)
        state = query.new_zeros(query.shape[0], key.shape[2]) if votes is None else votes.to(query.dtype, copy=True)
        alone = Ballot(self.how, 0, self.position, self.protected)
        for rows, cols in spans:
            yield state.clone()
            part = strips.strip(one, its_key, mask, self.how, rows, cols)
            alone.penalty(part, part.logits[:, 0], state)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    attn_mask: Tensor | None,
    ballot: Ballot,
    votes: Tensor | None = None,
    budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, L, Dv]``, and the votes ``[B, S]`` that every key has received, old ones included.

    With a ``budget``, a key that is evicted, or that no query sees, has infinite votes from then on.
    """
    (B, H, L, _), S, how = query.shape, key.shape[2], ballot.how
    dtype = accumulation_dtype(query.dtype)
    out = query.new_empty(B, H, L, value.shape[3])
    q, k, v, strength = (x.to(dtype) for x in (query, key, value, gamma))
    state = q.new_zeros(B, S) if votes is None else votes.to(dtype, copy=True)
    live = ~torch.isinf(state) & (torch.arange(S, device=state.device) < S - L)  # none of the new keys yet
    for rows, cols in strips.spans(B, H, L, S, how):
        part = strips.strip(q, k, attn_mask, how, rows, cols)
        penalty, seen = ballot.penalty(part, part.logits[:, ballot.head], state), part.seen
        if budget is not None:
            own = strips.lag(rows, cols, ballot.position, q.device) == 0
            alive = survivors(penalty, seen_by(seen, ballot.head), own, ballot.protected, live, cols, budget)
            penalty = penalty.masked_fill(~alive, 0.0)
            seen = alive.unsqueeze(1) if seen is None else seen & alive.unsqueeze(1)
        weights = masked_softmax(part.logits - strength * penalty.unsqueeze(1), seen)
        kept = how.kept(weights, rows)
        weights = weights if kept is None else weights * kept
        out[:, :, rows] = strips.per_group(weights, v[:, :, cols]).to(out.dtype)
    return out, state if budget is None else state.masked_fill(~live, torch.inf)
