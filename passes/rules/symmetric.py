"""Symmetric and pairwise attention: queries and keys come from one projection.

The projections themselves are replaced when a model is converted, so that a site's query is r or r S already, and its
key r, both after whatever the model does to them: rotation, norms, a cache.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.kernels.symmetric.reference import SELF
from attnrewrite.passes.attention.form import Attention, Operand, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.graph.axes import AxisError, Layout, backward, flat_layout
from attnrewrite.passes.graph.nodes import argument, is_node, op, same_value, shape
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.sdpa import attention_arguments, check_terms, common_dtype, empty_rows

_DEPTH = 40
"""Steps between a projection and the product, at most."""


class SymmetricRule:
    """Forms ``symmetric`` and ``pairwise``; see ``kernels/symmetric/README.md`` for the maths."""

    variant = "symmetric"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) groups of query heads that would get equal queries, and a diagonal that is not known."""
        check_terms(site)
        if request.config.get("form") == "symmetric" and site.groups:
            raise Reject(
                "AR307",
                "query heads share keys, so that one r would give a whole group equal queries",
                site.anchor,
                "form='pairwise', or as many key heads as query heads",
            )
        if request.config.get("mask_self") and not same_length(site) and site.visibility.dense:
            raise Reject(
                "AR307",
                "mask_self needs to know where a query stands among the keys; with this mask only the model does",
                site.anchor,
                "a whole sequence, or a cache that grows by the new keys",
            )

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Nothing beside the site's own tensors."""
        return {}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return attention of r alone where query and key are the same value, else of query and key."""
        from attnrewrite.kernels.symmetric.op import symmetric_attention  # defines an operator, which takes its time

        mask_self = bool(request.config.get("mask_self", False))

        def symmetric(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            given = attention_arguments(t, q.dtype)
            if one_value(t.site):
                out = symmetric_attention(k, v, dropout_p=t.site.dropout, mask_self=mask_self, **given)
                return empty_rows(t, out, q, k, v, forward=True)
            if mask_self:
                masks = (given["attn_mask"], given["is_causal"], given["window"])
                given |= {"attn_mask": _without_itself(t, *masks, q), "is_causal": False, "window": None}
            out = attention(q, k, v, dropout_p=t.site.dropout, **given)
            return empty_rows(t, out, q, k, v, forward=mask_self or given["softcap"] is not None)

        return symmetric


def one_value(site: Attention) -> bool:
    """Whether query and key are made by the same steps from the same values: r, not yet joined to earlier ones."""
    if site.keys is not None or site.scores.factors or site.groups or not same_length(site):
        return False
    pairs = zip(site.query_layout, site.key_layout, strict=True)
    renamed = {s: t for dims in pairs for s, t in zip(*dims, strict=False)}
    (query, laid_out), (key, wanted) = _unmoved(site.query), _unmoved(site.key)
    alike = [tuple(renamed.get(s) for s in dim) for dim in laid_out] == list(wanted)
    return alike and same_value(query, key, _DEPTH, _piece)


def _unmoved(operand: Operand) -> tuple[fx.Node, Layout]:
    """Return the value before its axes were moved, and its layout."""
    found = operand.node, operand.layout
    while True:
        try:
            moved = backward(found[1], found[0])
        except AxisError:
            moved = None
        if moved is None:
            return found[0], flat_layout(found[1])
        found = moved


def _piece(node: object) -> object:
    """Return the part of ``cat([a, b, ..])`` that ``cat.split(..)[n]`` takes out again, or else ``node``."""
    if not is_node(node) or node.target is not operator.getitem or not is_node(split := node.args[0]):
        return node
    joined, number = split.args[0], node.args[1]
    if op(split) not in ("split", "split_with_sizes", "chunk") or not is_node(joined) or op(joined) != "cat":
        return node
    parts: Any = joined.args[0]
    rank = len(shape(joined))
    dim = int(argument(joined, 1, "dim", 0)) % rank
    if dim != int(argument(split, 2, "dim", 0)) % rank:
        return node
    wanted = _edges(split.meta["val"], dim)[int(str(number))]
    edges = _edges([part.meta["val"] for part in parts], dim)
    return next((part for part, edge in zip(parts, edges, strict=True) if edge == wanted), node)


def _edges(pieces: Sequence[torch.Tensor], dim: int) -> list[tuple[int, int]]:
    """Return where pieces that lie side by side begin and end."""
    ends = list(itertools.accumulate(piece.shape[dim] for piece in pieces))
    return list(zip([0, *ends], ends, strict=False))


def _without_itself(
    t: SiteTensors, mask: torch.Tensor | None, is_causal: bool, window: int | None, query: torch.Tensor
) -> torch.Tensor:
    """Return an additive mask [B|1, H|1, L, S] that takes each query's own key away, where it sees others.

    Where the mask does not say where the queries stand, they are the last of the keys: those before are in a cache.
    """
    offset = t.site.visibility.facts.offset
    rows = torch.arange(t.length, device=query.device)[:, None] + (t.width - t.length if offset is None else offset)
    lag = rows - torch.arange(t.width, device=query.device)
    out = torch.zeros_like(lag, dtype=query.dtype)[None, None] if mask is None or mask.dtype == torch.bool else mask
    if mask is not None and mask.dtype == torch.bool:
        out = out.masked_fill(~mask, float("-inf"))
    if is_causal:
        out = out.masked_fill(lag < 0 if window is None else (lag < 0) | (lag >= window), float("-inf"))
    hidden = out <= torch.finfo(out.dtype).min / 2  # nothing may be added to the lowest number
    return torch.where((lag == 0) & ~hidden, out + SELF, out)
