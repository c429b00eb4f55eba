"""A bounded cache: which keys are evicted, so that no more than a budget of them is ever attended to.

When a new key makes them more than the budget, the one with the largest penalty F goes, before its query attends: never
the new key itself, nor a protected one, and the oldest among equals. A key that leaves the window goes by itself.
Nothing comes back. F depends on queries and keys alone and not on what was evicted, so that a whole sequence can be
pruned row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def survivors(
    penalty: Tensor,
    seen: Tensor | None,
    own: Tensor,
    protected: Tensor | None,
    live: Tensor,
    cols: slice,
    budget: int | Tensor,
) -> Tensor:
    """Return the live keys of every query of a strip, ``[B, rows, cols]``, and update ``live`` ``[B, S]``.

    Args:
        penalty: F ``[B, rows, cols]``.
        seen: visible pairs, ``[B or 1, rows, cols]``; a key that its own query does not see never lives, and one that a
            later query does not see lives no longer.
        own: ``[rows, cols]``, the key at each query's position.
        protected: ``[B or 1, S]``, or None.
        live: keys that lived before the strip.
        cols: the keys of the strip; what lies before them is not seen any more.
        budget: how many may live, at least 2.
    """
    live[:, : cols.start] = False
    here, sequences = live[:, cols], torch.arange(live.shape[0], device=live.device)
    exempt = torch.zeros_like(here) if protected is None else protected[:, cols].expand_as(here)
    found = []
    for row in range(penalty.shape[1]):
        here |= own[row]
        if seen is not None:
            here &= seen[:, row]
        may_go = here & ~exempt & ~own[row]
        largest = penalty[:, row].masked_fill(~may_go, -1.0).argmax(-1)  # the first among equals
        goes = (here.sum(-1) > budget) & may_go.any(-1)
        here[sequences, largest] &= ~goes
        found.append(here.clone())
    return torch.stack(found, 1)


def evicted(votes: Tensor, seen: Tensor | None, protected: Tensor | None, cols: slice, budget: int | Tensor) -> Tensor:
    """Return the votes ``[B, S]`` before the newest query, infinite for keys that it cannot attend to any more.

    ``seen`` ``[B or 1, 1, cols]`` are the keys that it sees; what else there is, ``survivors`` says.
    """
    live = ~torch.isinf(votes)
    live[:, -1] = False
    own = torch.arange(cols.start, votes.shape[1], device=votes.device) == votes.shape[1] - 1
    survivors(votes[:, None, cols], seen, own.unsqueeze(0), protected, live, cols, budget)
    return votes.masked_fill(~live, torch.inf)
