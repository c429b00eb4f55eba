"""The votes of selective attention in strips of queries: who may vote, what they sum up to, what they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.selective.reference import seen_by
from attnrewrite.kernels.strips import Options, Strip
from attnrewrite.kernels.visibility import accumulation_dtype


@dataclass
class Ballot:
    """Who may vote on whom, and what the votes sum up to.

    ``protected`` is ``[B or 1, S]``: keys on which nobody may vote; None if there are none.
    """

    how: Options
    head: int
    protected: Tensor | None

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, attn_mask: Tensor | None, how: Options, head: int, protect_first: bool
    ) -> Ballot:
        """Find the protected keys: those that their own query sees first. Earlier keys than the queries have none."""
        if not protect_first:
            return cls(how, head, None)
        (B, H, L, _), S = query.shape, key.shape[2]
        found = [torch.zeros(1, how.offset, dtype=torch.bool, device=query.device)]
        for rows, cols in strips.spans(B, H, L, S, how):
            seen = seen_by(strips.seen(rows, cols, attn_mask, how, query.device), head)
            lag = strips.lag(rows, cols, how, query.device)
            if seen is None:
                found.append(((lag == 0) & (lag[:, :1] <= 0)).any(-1).unsqueeze(0))
            else:
                found.append(((seen & (lag == 0)).any(-1)) & ~(seen & (lag > 0)).any(-1))
        batch = max(x.shape[0] for x in found)
        return cls(how, head, torch.cat([x.expand(batch, -1) for x in found], dim=1))

    def may_vote(self, part: Strip) -> Tensor:
        """Return ``[B or 1, rows, cols]``."""
        other = strips.lag(part.rows, part.cols, self.how, part.logits.device) != 0
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
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, spans: list[tuple[slice, slice]]
    ) -> Iterator[Tensor]:
        """Yield the state ``[B, S]`` before each strip, from the selection head alone."""
        group = query.shape[1] // key.shape[1]
        one, its_key = query[:, self.head : self.head + 1], key[:, self.head // group : self.head // group + 1]
        mask = None if attn_mask is None else strips.one_head(attn_mask, self.head)
        state = query.new_zeros(query.shape[0], key.shape[2])
        alone = Ballot(self.how, 0, self.protected)
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
    how: Options,
    ballot: Ballot,
    votes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, L, Dv]``, and the votes ``[B, S]`` that every key has received, old ones included."""
    (B, H, L, _), S = query.shape, key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    out = query.new_empty(B, H, L, value.shape[3])
    q, k, v, strength = (x.to(dtype) for x in (query, key, value, gamma))
    state = q.new_zeros(B, S) if votes is None else votes.to(dtype, copy=True)
    for rows, cols in strips.spans(B, H, L, S, how):
        part = strips.strip(q, k, attn_mask, how, rows, cols)
        penalty = ballot.penalty(part, part.logits[:, ballot.head], state)
        weights = masked_softmax(part.logits - strength * penalty.unsqueeze(1), part.seen)
        kept = how.kept(weights, rows)
        weights = weights if kept is None else weights * kept
        out[:, :, rows] = strips.per_group(weights, v[:, :, cols]).to(out.dtype)
    return out, state
