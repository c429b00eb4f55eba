"""Symmetric and pairwise attention: queries and keys come from one projection.

The projections themselves are replaced when a model is converted, so that a site's query is r or r S already, and its
key r, both after whatever the model does to them: rotation, norms, a cache.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.kernels.symmetric.reference import SELF
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.graph.axes import flat_layout, same
from attnrewrite.passes.graph.nodes import argument, is_node, op, same_value, shape
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.sdpa import check_terms, common_dtype, empty_rows, mask_arguments


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
            q, k, v = common_dtype(t.query(), t.key(), t.value())
            mask, is_causal = mask_arguments(t, q.dtype)
            scale, softcap = t.site.scores.alpha, t.site.scores.softcap
            if one_value(t.site):
                out = symmetric_attention(
                    k, v, None, mask, t.site.dropout, is_causal, scale, softcap=softcap, mask_self=mask_self
                )
                return empty_rows(t, out, q, k, v, forward=True)
            if mask_self:
                mask, is_causal = _without_itself(t, mask, is_causal, q), False
            out = attention(
                q, k, v, mask, t.site.dropout, is_causal, scale=scale, enable_gqa=t.grouped, softcap=softcap
            )
            return empty_rows(t, out, q, k, v, forward=softcap is not None)

        return symmetric


def one_value(site: Attention) -> bool:
    """Whether query and key are made by the same steps from the same values: r, not yet joined to earlier ones."""
    if site.keys is not None or site.scores.factors or not same_length(site) or site.groups:
        return False
    query = [size for dim in flat_layout(site.query.layout) for size in dim]
    key = [size for dim in flat_layout(site.key.layout) for size in dim]
    renamed = dict(zip((s for dim in site.query_layout for s in dim), (s for dim in site.key_layout for s in dim)))
    return [renamed.get(s) for s in query] == key and _same(site.query.node, site.key.node)


def _same(a: object, b: object, depth: int = 40) -> bool:
    """Whether two values are the same; pieces of joined values are the values that were joined."""
    a, b = _piece(a), _piece(b)
    if a is b or not (is_node(a) and is_node(b)) or depth == 0:
        return same_value(a, b)
    if a.target is not b.target or not isinstance(a.target, torch._ops.OpOverload) or a.target._schema.is_mutable:
        return False
    lists = [_arguments(node) for node in (a, b)]
    return len(lists[0]) == len(lists[1]) and all(_same(x, y, depth - 1) for x, y in zip(*lists, strict=True))


def _arguments(node: fx.Node) -> list[object]:
    """Return all arguments in one list; lists of them are opened."""
    found: list[object] = []
    for value in [*node.args, *(node.kwargs[key] for key in sorted(node.kwargs))]:
        found += [len(value), *value] if isinstance(value, list | tuple) else [value]
    return found


def _piece(node: object) -> object:
    """Return the part of ``cat([a, b, ..])`` that ``cat.split(..)[n]`` takes out again, or else ``node``."""
    if not is_node(node) or node.target is not operator.getitem or not is_node(split := node.args[0]):
        return node
    joined, number = split.args[0], node.args[1]
    if op(split) not in ("split", "split_with_sizes", "chunk") or not is_node(joined) or op(joined) != "cat":
        return node
    parts, rank = joined.args[0], len(shape(joined))
    dims = {int(argument(joined, 1, "dim", 0)) % rank, int(argument(split, 2, "dim", 0)) % rank}
    if len(dims) != 1 or not isinstance(parts, list | tuple) or not isinstance(number, int):
        return node
    dim = dims.pop()
    pieces = [value.shape[dim] for value in split.meta["val"]]
    start, end = sum(pieces[:number]), sum(pieces[: number + 1])
    for part in parts:
        if is_node(part) and same(start, 0) and same(shape(part)[dim], end):
            return part
        width = shape(part)[dim] if is_node(part) else 0
        start, end = start - width, end - width
    return node


def _without_itself(t: SiteTensors, mask: torch.Tensor | None, is_causal: bool, query: torch.Tensor) -> torch.Tensor:
    """Return an additive mask that also takes each query's own key away, where there are others.

    Queries are the last of the keys: those before come from a cache.
    """
    offset = t.width - t.length
    lag = torch.arange(t.length, device=query.device)[:, None] + offset - torch.arange(t.width, device=query.device)
    own = torch.where(lag == 0, SELF, 0.0).to(query.dtype)  # [L, S]
    if is_causal:
        own = own.masked_fill(lag < 0, float("-inf"))
    if mask is None:
        return own[None, None]
    return own.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask + own
