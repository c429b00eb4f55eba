"""Which keys a query sees, the slices they are cut into, and how many slices it keeps (arXiv 2310.01777, section 3).

A query that sees n keys has its estimate's M columns stand for M slices of these keys, counted in order of
position without the padding. All of it is integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The visible keys of every query, as ranks: query i sees the ranks first <= r < first + count.

    ``first`` and ``count`` are ``[B or 1, L]``; ``tokens``, ``[B or 1, S]``, is the position of the key of each
    rank; ``real``, ``[B or 1, S]``, is False at padding. A padding query has count 0. The queries are the last L of
    the S positions, or ``placed`` anywhere among them.
    """

    first: Tensor
    count: Tensor
    tokens: Tensor
    real: Tensor
    is_causal: bool
    window: int | None
    padded: bool
    placed: bool = False

    def extent(self, start: int, stop: int) -> tuple[int, int]:
        """Bound the counts of the queries from ``start`` to ``stop`` without looking at them."""
        S, L = self.tokens.shape[-1], self.count.shape[-1]
        last = self.is_causal and not self.placed
        least, most = (S - L + start + 1, S - L + stop) if last else (S, S)
        if self.window is not None:
            least, most = min(least, self.window), min(most, self.window)
        return (1 if self.padded or self.placed else least), most

    def blank(self, states: Tensor) -> Tensor:
        """Set what padding queries hold, ``[B, H, L]`` or ``[B, H, L, D]``, to 0: it may be NaN."""
        if not self.padded:
            return states
        blind = (self.count == 0).unsqueeze(1)
        return states.masked_fill(blind if states.dim() == 3 else blind.unsqueeze(-1), 0.0)


class Rule(NamedTuple):
    """How many slices are kept, and which of them compete."""

    budget: int
    counting: str = "exact"  # or "paper"
    grouping: str = "causal_per_batch"  # or "per_query"

    def competing(self, H: int) -> int:
        """Return how many heads share one budget."""
        return H if self.grouping == "causal_per_batch" else 1


def visible_rows(
    L: int,
    S: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
    device: torch.device | None = None,
    first: Tensor | None = None,
) -> Rows:
    """Return what the last L of S positions see, or those from ``first`` on.

    Args:
        L: number of queries.
        S: number of keys.
        is_causal: query i sees no key behind it.
        window: with ``is_causal``, query i sees key j iff also i - j < window.
        padding: boolean ``[B or 1, S]``, False where the token is padding; None if none is.
        device: where the tensors are built.
        first: a number.
    """
    real = torch.ones(1, S, dtype=torch.bool, device=device) if padding is None else padding
    before = torch.nn.functional.pad(real.long().cumsum(-1), (1, 0))  # [B, S + 1], real tokens before each position
    position = torch.arange(L, device=device) + (S - L if first is None else first)
    last = position + 1 if is_causal else torch.full_like(position, S)
    start = torch.zeros_like(last) if window is None else (last - window).clamp(min=0)
    hidden = before[:, start]
    count = torch.where(real[:, position], before[:, last] - hidden, 0)
    tokens = torch.argsort(~real, dim=-1, stable=True)
    return Rows(hidden, count, tokens, real, is_causal, window, padding is not None, first is not None)


def boundaries(count: Tensor, M: int) -> Tensor:
    """Return b_m = floor(m n / M + 1/2) for m = 0 to M: slice m holds the ranks b_m to b_{m+1} - 1 of n.

    Args:
        count: integers n, ``[...]``.
        M: number of slices.

    Returns:
        ``[..., M + 1]``, from 0 to n; each slice is floor(n / M) or ceil(n / M) wide.
    """
    m = torch.arange(M + 1, device=count.device)
    return (2 * m * count.unsqueeze(-1) + M) // (2 * M)


def slice_of(rank: Tensor, count: Tensor, M: int) -> Tensor:
    """Return the slice that holds a rank: the last m with m < (rank + 1/2) M / n, which agrees with ``boundaries``."""
    return ((2 * rank + 1) * M - 1) // (2 * count.clamp(min=1))


def slices_kept(count: Tensor, heads: int, M: int, rule: Rule) -> Tensor:
    """Return how many slices of ``heads`` competing heads are kept where n keys are seen, halves rounded up.

    "paper" (as in the authors' code): round(heads k M / n), between 1 and heads M. "exact" (ours): round(heads k
    min(M / n, 1)), between 1 and heads min(n, M), the number of slices that are not empty, so that a query with
    n <= k keys keeps them all.
    """
    n = count.clamp(min=1)
    live = n.clamp(max=M)
    if rule.counting == "exact":
        n = n.clamp(min=M)
    wanted = ((2 * heads * rule.budget * M + n) // (2 * n)).clamp(min=1)
    return torch.minimum(wanted, heads * (live if rule.counting == "exact" else torch.full_like(live, M)))


def most_kept(least: int, most: int, heads: int, M: int, rule: Rule) -> int:
    """Bound ``slices_kept`` for all n with least <= n <= most."""
    exact = rule.counting == "exact"
    n = max(least, M) if exact else least
    wanted = (2 * heads * rule.budget * M + n) // (2 * n)
    return min(max(wanted, 1), heads * (min(most, M) if exact else M))


def most_tokens(least: int, most: int, heads: int, M: int, rule: Rule) -> int:
    """Bound the keys that ``heads`` competing heads keep, for all n with least <= n <= most."""
    widest = min(-(-most // M), rule.budget)
    # With q = n / M > 1: at most (heads k / q + 1/2) slices of min(q + 1, k) tokens.
    anywhere = 2 * heads * rule.budget + rule.budget // 2 + 1
    if rule.counting == "paper":
        anywhere = max(anywhere, heads * min(most, M))
    return min(most_kept(least, most, heads, M, rule) * widest, heads * most, anywhere)
