"""The votes of selective attention in strips of queries: who may vote, what they sum up to, what they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.selective.pruning import survivors
from attnrewrite.kernels.selective.reference import seen_by
from attnrewrite.kernels.strips import Options, Strip
from attnrewrite.kernels.visibility import accumulation_dtype, four_dimensional


@dataclass(frozen=True)
class Voter:
    """The one head whose logits are the votes, in the accumulation dtype.

    ``query`` is ``[B, 1, L, Ds]``, ``key`` ``[B, 1, S, Ds]``, ``mask`` ``[B or 1, 1, L or 1, S or 1]`` or None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    how: Options

    def strip(self, rows: slice, cols: slice) -> Strip:
        """Compute its strip, ``[B, 1, rows, cols]``."""
        return strips.strip(self.query, self.key, self.mask, self.how, rows, cols)


@dataclass
class Ballot:
    """Who may vote on whom, and what the votes sum up to.

    Head ``head`` votes, or in its place the queries ``[B, L, Ds]`` and keys ``[B, S, Ds]`` of ``selector``; keys that
    are visible to the head may be voted on. ``position`` is where the first query stands among the keys;
    ``protected`` is ``[B or 1, S]``: keys on which nobody may vote; None if there are none.
    """

    how: Options
    head: int
    position: int | Tensor = 0
    selector: tuple[Tensor, Tensor] | None = None
    protected: Tensor | None = None

    def voter(self, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Voter:
        """Return the head that votes; ``query`` and ``key`` are in the accumulation dtype."""
        if self.selector is None:
            mask = None if attn_mask is None else strips.one_head(attn_mask, self.head)
            group = self.head // (query.shape[1] // key.shape[1])
            slopes = None if self.how.slopes is None else self.how.slopes[self.head : self.head + 1]
            how = replace(self.how, sinks=None, slopes=slopes)
            return Voter(query[:, self.head : self.head + 1], key[:, group : group + 1], mask, how)
        own_query, own_key = (x.to(query.dtype).unsqueeze(1) for x in self.selector)
        how = replace(self.how, scale=own_query.shape[3] ** -0.5, softcap=None, sinks=None, slopes=None)
        return Voter(own_query, own_key, strips.seen_by_head(attn_mask, self.head), how)

    def logits(self, part: Strip, voter: Voter) -> Tensor:
        """Return the logits of the votes, ``[B, rows, cols]``; ``part`` is the strip of all heads."""
        if self.selector is None:
            return part.logits[:, self.head]
        return voter.strip(part.rows, part.cols).logits[:, 0]

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

    def states(self, voter: Voter, spans: list[tuple[slice, slice]], votes: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the state ``[B, S]`` before each strip: ``votes``, and what the voter adds to them."""
        state = first_state(voter.key, votes)
        for rows, cols in spans:
            yield state.clone()
            part = voter.strip(rows, cols)
            self.penalty(part, part.logits[:, 0], state)

    def by_logits(self, part: Strip, logits: Tensor, by_penalty: Tensor, later: Tensor) -> Tensor:
        """Return the gradient ``[B, rows, cols]`` by the logits of a strip's votes.

        ``by_penalty`` is the gradient by its penalties, ``later`` ``[B, S]`` the sum of it over later queries, to which
        that of this strip is added.
        """
        whole = by_penalty.sum(1)
        after = later[:, None, part.cols] + whole.unsqueeze(1) - torch.cumsum(by_penalty, dim=1)
        later[:, part.cols] += whole
        return torch.where(self.may_vote(part) & (logits > 0), after, 0.0)


def selector(vote_query: Tensor | None, vote_key: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the two of a selector, or None without one."""
    return None if vote_query is None or vote_key is None else (vote_query, vote_key)


def first_state(like: Tensor, votes: Tensor | None) -> Tensor:
    """Return a copy of the votes ``[B, S]``, or zeros for keys ``[B, h, S, D]`` on which nobody has voted."""
    return like.new_zeros(like.shape[0], like.shape[2]) if votes is None else votes.to(like.dtype, copy=True)


def lessened(logits: Tensor, penalty: Tensor, strength: Tensor) -> Tensor:
    """Return logits ``[B, H, rows, cols]`` less the penalty ``[B, rows, cols]`` times ``strength``.

    An infinite one leaves -inf, whatever the strength is: the key was evicted.
    """
    return logits - torch.where(penalty.isinf(), torch.inf, strength * penalty).unsqueeze(1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    attn_mask: Tensor | None,
    ballot: Ballot,
    votes: Tensor | None = None,
    budget: int | None = None,
    recent: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, L, Dv]``, and the votes ``[B, recent, S]`` that every key has received.

    Votes are counted with the old ones, after each of the last ``recent`` queries. With a ``budget`` that is the last
    one, and a key that is evicted, or that no query sees, has infinite votes from then on.
    """
    (B, H, L, _), S, how = query.shape, key.shape[2], ballot.how
    dtype = accumulation_dtype(query.dtype)
    out = query.new_empty(B, H, L, value.shape[3])
    q, k, v, strength = (x.to(dtype) for x in (query, key, value, gamma))
    voter, state = ballot.voter(q, k, attn_mask), first_state(k, votes)
    received = state.new_zeros(B, recent, S)
    live = ~torch.isinf(state) & (torch.arange(S, device=state.device) < S - L)  # none of the new keys yet
    for rows, cols in strips.spans(B, H, L, S, how):
        part = strips.strip(q, k, attn_mask, how, rows, cols)
        penalty, seen = ballot.penalty(part, ballot.logits(part, voter), state), part.seen
        if budget is not None:
            own = strips.lag(rows, cols, ballot.position, q.device) == 0
            alive = survivors(penalty, seen_by(seen, ballot.head), own, ballot.protected, live, cols, budget)
            penalty = penalty.masked_fill(~alive, 0.0)
            seen = alive.unsqueeze(1) if seen is None else seen & alive.unsqueeze(1)
        weights = masked_softmax(lessened(part.logits, penalty, strength), seen, how.sinks)
        kept = how.kept(weights, rows)
        weights = weights if kept is None else weights * kept
        out[:, :, rows] = strips.per_group(weights, v[:, :, cols]).to(out.dtype)
        _record(received, L, rows, cols, penalty, state)
    return out, received if budget is None else received.masked_fill(~live.unsqueeze(1), torch.inf)


def _record(received: Tensor, L: int, rows: slice, cols: slice, penalty: Tensor, state: Tensor) -> None:
    """Write the votes after each query of a strip into the last of ``[B, recent, S]``.

    That is the penalty of the next query; ``state`` is what the strip leaves.
    """
    first = L - received.shape[1]
    if rows.stop <= first:
        return
    start = max(rows.start, first)
    after = torch.cat((penalty[:, start - rows.start + 1 :], state[:, None, cols]), 1)
    received[:, start - first : rows.stop - first] = state.unsqueeze(1)
    received[:, start - first : rows.stop - first, cols] = after
