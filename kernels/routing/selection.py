"""Which queries are scored against which keys: groups of queries that share one list of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnrewrite.kernels.routing.clusters import nearest, strongest


class Block(NamedTuple):
    """Some groups of a selection, by position; -1 is none."""

    queries: Tensor  # [B, H, G, M]
    keys: Tensor  # [B, H, G, K]
    pairs: Tensor | None = None  # [B, H, G, M, K], which of them meet; None if all do


class Selection(Protocol):
    """Groups of queries, each with its keys."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, queries in each, keys in each."""

    def block(self, start: int, stop: int) -> Block:
        """Return the groups from ``start`` to before ``stop``."""


@dataclass(frozen=True)
class Clusters:
    """Rule ``topw``: group c holds the queries and the keys nearest to centroid c."""

    queries: Tensor  # [B, H, C, M]
    keys: Tensor  # [B, Hkv, C, K]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, queries in each, keys in each."""
        return self.queries.shape[2], self.queries.shape[3], self.keys.shape[3]

    def block(self, start: int, stop: int) -> Block:
        """Return the groups from ``start`` to before ``stop``."""
        repeats = self.queries.shape[1] // self.keys.shape[1]
        keys = self.keys[:, :, start:stop].repeat_interleave(repeats, dim=1)
        return Block(self.queries[:, :, start:stop], keys)


@dataclass(frozen=True)
class Windows:
    """Rule ``argmax_window``: group i holds query i and the keys of its cluster that lie around it.

    ``order`` lists the keys by cluster, then position; query i takes the ranks from ``low`` to before ``high`` of it.
    """

    order: Tensor  # [B, Hkv, S]
    low: Tensor  # [B, H, L]
    high: Tensor  # [B, H, L]
    alone: Tensor | None  # [B, H, L], whether the query's own key is of another cluster; None if it never is
    valid: Tensor | None  # [B, L]
    width: int
    first: int | Tensor = 0  # the position of query 0 among the keys

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, queries in each, keys in each."""
        return self.low.shape[2], 1, self.width + (self.alone is not None)

    def block(self, start: int, stop: int) -> Block:
        """Return the groups from ``start`` to before ``stop``."""
        low, high = self.low[:, :, start:stop], self.high[:, :, start:stop]
        keys = take_ranks(self.order, low, high, self.width)
        position = torch.arange(start, stop, device=low.device).expand_as(low)
        if self.alone is not None:
            itself = torch.where(self.alone[:, :, start:stop], position + self.first, -1)
            keys = torch.cat((keys, itself.unsqueeze(-1)), dim=-1)
        if self.valid is not None:
            position = torch.where(self.valid[:, None, start:stop], position, -1)
        return Block(position.unsqueeze(-1), keys)


def select_clusters(
    queries: Tensor,
    keys: Tensor,
    window_size: int | None,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Clusters:
    """Give every centroid the ``window_size`` queries and keys nearest to it.

    Args:
        queries: affinities ``[B, H, L, C]``.
        keys: affinities ``[B, Hkv, S, C]``; the same tensor when both are shared.
        window_size: at most L and S are taken; ``ceil(L / C)`` and ``ceil(S / C)`` if None.
        query_valid: ``[B, L]`` boolean or None.
        key_valid: ``[B, S]`` boolean or None.
    """
    members = strongest(queries, width_of(window_size, queries), query_valid)
    if keys is queries:
        return Clusters(members, members)
    return Clusters(members, strongest(keys, width_of(window_size, keys), key_valid))


def select_windows(
    queries: Tensor,
    keys: Tensor,
    window_size: int | None,
    *,
    is_causal: bool,
    valid: Tensor | None = None,
    first: int | Tensor = 0,
) -> Windows:
    """Give every query the keys of its cluster that lie around it in ``window_size`` ranks.

    Causal: the last ``window_size`` keys j <= i. Else the last half j <= i (rounded up) and the first half j > i.

    Args:
        queries: affinities ``[B, H, L, C]``.
        keys: affinities ``[B, Hkv, N, C]``, the same tensor when both are shared; or clusters ``[B, Hkv, N]``.
        window_size: ranks per query; ``ceil(N / C)`` if None.
        is_causal: whether only keys j <= i are taken.
        valid: ``[B, N]`` boolean or None.
        first: position of the first query among the keys.
    """
    N = keys.shape[2]
    position = torch.arange(queries.shape[2], device=queries.device) + first
    asked, offered, real = assigned(queries, keys, valid, position)
    width = wanted_width(window_size, queries)
    before = width if is_causal else width - width // 2
    ranked = ranks(offered)
    end = rank_after(ranked, asked * N + position)
    low = torch.maximum(rank_after(ranked, asked * N - 1), end - before)
    high = end if is_causal else torch.minimum(rank_after(ranked, asked * N + N - 1), end + width // 2)
    own = None if keys is queries else offered.index_select(2, position)
    alone = None if own is None else asked != own.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    # A causal query has at most N keys, any other at most N too: further ranks would be empty.
    return Windows(ranked % N, low, high, alone, real, smaller(width, N), first)


def assigned(
    queries: Tensor, keys: Tensor, valid: Tensor | None, position: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the clusters of queries ``[B, H, L]`` and keys ``[B, Hkv, N]``, and which queries are real, ``[B, L]``.

    Arguments as in ``select_windows``; ``position`` ``[L]`` are the places of the queries among the keys.
    """
    if keys.is_floating_point():
        return nearest(queries, valid), nearest(keys, valid), valid
    real = None if valid is None else valid.index_select(1, position)
    return nearest(queries, real), keys, real


def ranks(cluster: Tensor) -> Tensor:
    """Return ``cluster * N + position`` in ascending order, ``[B, Hkv, N]``: by cluster, then position."""
    N = cluster.shape[-1]
    return (cluster * N + torch.arange(N, device=cluster.device)).sort(dim=-1).values


def rank_after(ranked: Tensor, value: Tensor) -> Tensor:
    """Return how many entries of ``ranked`` ``[B, Hkv, S]`` are at most ``value`` ``[B, H, L]``."""
    grouped = value.reshape(*ranked.shape[:2], -1)
    return torch.searchsorted(ranked, grouped, right=True).reshape(value.shape)


def take_ranks(order: Tensor, low: Tensor, high: Tensor, width: int) -> Tensor:
    """Return the entries of ``order`` at the ranks that end before ``high``, -1 for those below ``low``.

    Args:
        order: ``[B, Hkv, S]``.
        low: ``[B, H, L]``.
        high: ``[B, H, L]``.
        width: how many ranks.

    Returns:
        ``[B, H, L, width]``.
    """
    rank = high.unsqueeze(-1) + torch.arange(-width, 0, device=order.device)
    grouped = rank.clamp(min=0).reshape(*order.shape[:2], -1)
    taken = order.gather(-1, grouped).reshape(rank.shape)
    return torch.where(rank >= low.unsqueeze(-1), taken, -1)


def wanted_width(window_size: int | None, affinities: Tensor) -> int:
    """Return ``window_size``, or what makes the clusters cover the sequence once."""
    _, _, N, C = affinities.shape
    return -(-N // C) if window_size is None else window_size


def width_of(window_size: int | None, affinities: Tensor) -> int:
    """Return ``window_size``, or what makes the clusters cover the sequence once; at most the whole sequence."""
    return smaller(wanted_width(window_size, affinities), affinities.shape[2])


def smaller(a: int, b: int) -> int:
    """Return the smaller of two sizes, also where one is not known while tracing."""
    least: int = torch.sym_min(a, b)  # type: ignore[no-untyped-call]
    return least
