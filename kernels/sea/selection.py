"""The selected (head, key) pairs of every query: the best slices, expanded back to tokens (arXiv 2310.01777, 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.sea.slices import Rows, Rule, boundaries, most_kept, most_tokens, slices_kept
from attnrewrite.kernels.visibility import accumulation_dtype

# Numbers that the gathers of one chunk of queries may hold: 16 MiB in float32.
_CHUNK = 2**22


class Pairs(NamedTuple):
    """What R queries look at: ``[B, R, T]`` each; where ``used`` is False a slot is empty."""

    head: Tensor
    key: Tensor  # position
    used: Tensor


def selected_pairs(estimated: Tensor, rows: Rows, rule: Rule, width: int) -> Iterator[tuple[slice, Pairs]]:
    """Yield the selected pairs of some queries at a time, so that memory does not grow with their number.

    Args:
        estimated: logits ``[B, H, L, M]``.
        rows: what each query sees.
        rule: how many slices are kept.
        width: numbers gathered per pair, which decides how many queries make a chunk.
    """
    B, H, L, M = estimated.shape
    slots = _slots(*rows.extent(0, L), H, M, rule)
    step = max(1, _CHUNK // max(1, B * max(slots * width, H * M)))
    for start in range(0, max(L, 1), step):
        part = slice(start, min(start + step, L))
        yield part, _select(estimated[:, :, part], rows, part, rule)


def _select(estimated: Tensor, rows: Rows, part: slice, rule: Rule) -> Pairs:
    _, H, _, M = estimated.shape
    heads = rule.competing(H)
    least, most = rows.extent(part.start, part.stop)
    count = rows.count[:, part]  # [B, R]
    edges = boundaries(count, M)  # [B, R, M + 1]
    slices, kept = _best(estimated, count, edges.diff(dim=-1), rule, most_kept(least, most, heads, M, rule))
    return _expand(slices, kept, edges, rows, part, rule.budget, _slots(least, most, H, M, rule))


def _slots(least: int, most: int, H: int, M: int, rule: Rule) -> int:
    heads = rule.competing(H)
    return H // heads * most_tokens(least, most, heads, M, rule)


def _best(estimated: Tensor, count: Tensor, width: Tensor, rule: Rule, most: int) -> tuple[Tensor, Tensor]:
    """Return the best slices as h M + m, ``[B, R, P]``, and which of them are within the budget."""
    _, H, _, M = estimated.shape
    heads = rule.competing(H)
    grouped = slice_ranking(estimated, width, rule)
    # Stable: of equal slices the one of lower head, then of lower column, wins.
    order = torch.sort(grouped, dim=-1, descending=True, stable=True).indices[..., :most]
    first = torch.arange(0, H * M, heads * M, device=order.device).unsqueeze(-1)
    limit = slices_kept(count, heads, M, rule)[..., None, None]
    kept = torch.arange(order.shape[-1], device=order.device) < limit
    return (order + first).flatten(2), kept.expand_as(order).flatten(2)


def slice_ranking(estimated: Tensor, width: Tensor, rule: Rule) -> Tensor:
    """Return by what slices compete, ``[B, R, H / heads, heads M]``; ``width`` ``[B or 1, R, M]`` is that of each."""
    B, H, R, M = estimated.shape
    heads = rule.competing(H)
    # Logarithms, because probabilities that underflow would tie; float32, because 16-bit numbers tie often.
    ranking = torch.log_softmax(estimated.detach().to(accumulation_dtype(estimated.dtype)), dim=-1)
    ranking = ranking.clamp(min=torch.finfo(ranking.dtype).min).transpose(1, 2)  # [B, R, H, M]
    if rule.counting == "exact":
        ranking = ranking.masked_fill((width == 0).unsqueeze(2), float("-inf"))
    return ranking.reshape(B, R, H // heads, heads * M)


def _expand(slices: Tensor, kept: Tensor, edges: Tensor, rows: Rows, part: slice, budget: int, slots: int) -> Pairs:
    """Spread up to ``budget`` tokens over each slice, counted from its right end, the newest first."""
    B, R, _ = slices.shape
    M = edges.shape[-1] - 1
    column = slices % M
    edges = edges.expand(B, R, M + 1)
    left, right = edges.gather(-1, column), edges.gather(-1, column + 1)
    taken = torch.where(kept, (right - left).clamp(max=budget), 0)  # [B, R, P]
    ends = taken.cumsum(-1)
    slot = torch.arange(slots, device=slices.device).expand(B, R, slots).contiguous()
    used = slot < ends[..., -1:]
    of = torch.searchsorted(ends, slot, right=True).clamp(max=slices.shape[-1] - 1)  # [B, R, T], index into P
    width, c, end = (right - left).gather(-1, of), taken.gather(-1, of), ends.gather(-1, of)
    u = slot - (end - c)
    rank = right.gather(-1, of) - 1 - u * width // c.clamp(min=1) + rows.first[:, part].unsqueeze(-1)
    rank = torch.where(used, rank, 0)
    tokens = rows.tokens.expand(B, -1)
    key = tokens.gather(-1, rank.flatten(1)).reshape(rank.shape)
    return Pairs(torch.where(used, slices.gather(-1, of) // M, 0), key, used)
