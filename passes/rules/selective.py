"""Selective attention: votes of one head, accumulated over earlier queries, are taken off every head's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnrewrite.kernels.strips import draw_seed, seen_by_head
from attnrewrite.kernels.visibility import accumulation_dtype
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.graph.axes import same
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.sdpa import check_terms, common_dtype, empty_rows
from attnrewrite.passes.rules.selector import (
    add_head,
    check_input,
    has_selector,
    read_by_selector,
    selector_tensors,
    whole_head,
)
from attnrewrite.passes.rules.steps import check_causal, held, step_mask, whole_mask

_NEAREST = "causal self-attention over a whole sequence, masked by positions, padding or documents only"


class SelectiveRule:
    """Votes that count in full, or by the layer's factor ``gamma``."""

    variant = "selective"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) all but causal self-attention, over whole sequences or with a cache that holds votes."""
        if request.state:
            _check_step(site, packed="budget" in request.state)
        else:
            _check_whole(site)
        heads = site.sizes()["H"]
        head = int(request.config.get("selection_head", 0))
        if not isinstance(heads, int) or not 0 <= head < heads:
            raise Reject("AR307", f"selection_head {head} does not exist: the layer has {heads} heads", site.anchor)
        if has_selector(request):
            check_input(site, request)
        check_terms(site)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's ``gamma`` or selector with what it reads, if there is one, and the votes in a cache."""
        read = read_by_selector(site, request) if has_selector(request) else {}
        return {**request.parameters, **request.state, **read}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return selective attention with the request's options."""
        # These define operators, which takes its time.
        from attnrewrite.kernels.selective.op import selective_attention
        from attnrewrite.kernels.selective.step import step

        def selective(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            given = _arguments(t, request)
            out = selective_attention(q, k, v, dropout_p=t.site.dropout, sinks=t.sinks(), **given)
            if "added" in t.extra:
                seen = seen_by_head(given["attn_mask"], given["selection_head"])
                rules = {name: given[name] for name in ("is_causal", "window", "protect_first")}
                own = selective_attention(*whole_head(t, request), seen, t.site.dropout, **rules)
                add_head(t, own)
            return empty_rows(t, out, q, k, v, forward=True)

        def continued(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            whole = same_length(t.site) and not t.site.visibility.dense
            limit = t.extra.get("budget", t.extra.get("budget_in_place"))
            mask = _newest(t) if "budget" in t.extra and not whole else _mask(t, whole=whole)
            head, protect = (
                int(request.config.get("selection_head", 0)),
                bool(request.config.get("protect_first", True)),
            )
            window = t.site.visibility.facts.window if whole else None
            states = [held(t, name) for name in ("votes", "protected")]
            votes, protected = (state.clone() for state in states)  # as backward needs them
            position = None if whole else t.extra.get("position")
            one = q.new_ones((), dtype=accumulation_dtype(q.dtype))
            after = t.extra.get("votes_after")

            def attend(
                tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
                gamma: torch.Tensor,
                seen: torch.Tensor | None,
                scale: float,
                softcap: float | None,
                head: int,
                selector: Mapping[str, torch.Tensor],
                recent: int,
                sinks: torch.Tensor | None = None,
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = step(
                    *tensors,
                    gamma,
                    votes,
                    protected,
                    seen,
                    position,
                    draw_seed(q, t.site.dropout),
                    limit,
                    scale,
                    t.site.dropout,
                    window,
                    softcap,
                    head,
                    protect,
                    selector.get("vote_query"),
                    selector.get("vote_key"),
                    recent,
                    sinks,
                )
                return found

            scores, gamma = t.site.scores, t.extra.get("gamma", one)
            selector = selector_tensors(t, request) if has_selector(request) else {}
            recent = 1 if after is None else after.shape[1]
            out, received, exempt = attend(
                (q, k, v), gamma, mask, scores.alpha, scores.softcap, head, selector, recent, t.sinks()
            )
            if "added" in t.extra:
                tensors = whole_head(t, request)
                seen = seen_by_head(mask, head)
                add_head(t, attend(tensors, one, seen, tensors[0].shape[3] ** -0.5, None, 0, {}, 1)[0])
            if after is not None:
                after.copy_(received)
            for state, new in zip(states, (received[:, -1], exempt), strict=True):
                state.copy_(new)
            return empty_rows(t, out, q, k, v, forward=True) if limit is None else out

        return continued if request.state else selective


def needed_keys(t: SiteTensors, request: Request, tau: float) -> torch.Tensor:
    """Return how many keys each query of a site still needs, [B, L]: ``kernels.selective.memory``."""
    from attnrewrite.kernels.selective.memory import selective_memory  # defines an operator, which takes its time

    q, k, _ = common_dtype(t.query(), t.key(), t.attended())
    return selective_memory(q, k, tau=tau, **_arguments(t, request))


def _arguments(t: SiteTensors, request: Request) -> dict[str, Any]:
    """Return what tells the votes over a whole sequence."""
    return {
        "attn_mask": _mask(t, whole=True),
        "is_causal": True,
        "scale": t.site.scores.alpha,
        "enable_gqa": t.grouped,
        "window": t.site.visibility.facts.window,
        "selection_head": int(request.config.get("selection_head", 0)),
        "gamma": t.extra.get("gamma", 1.0),
        "protect_first": bool(request.config.get("protect_first", True)),
        "softcap": t.site.scores.softcap,
        **(selector_tensors(t, request) if has_selector(request) else {}),
    }


def _mask(t: SiteTensors, *, whole: bool) -> torch.Tensor | None:
    """Return the mask [B|1, H|1, L|1, S]: boolean, or a bias. Over a ``whole`` sequence, causality is a flag."""
    return whole_mask(t) if whole else step_mask(t)


def _newest(t: SiteTensors) -> torch.Tensor | None:
    """Return the mask [B|1, H|1, L|1, S] of the new keys, where a bounded cache gives older ones side by side."""
    seen = t.visible()
    if seen is None:
        return None
    new = seen.expand(-1, -1, -1, t.width)[..., t.width - t.length :]
    return torch.nn.functional.pad(new, (t.width - t.length, 0), value=True)


def _check_step(site: Attention, *, packed: bool) -> None:
    """Refuse (AR307) new queries that see later keys, and what depends on the places of keys where they lie packed."""
    seen = site.visibility
    if packed and (seen.bias or seen.facts.window is not None):
        what = "a window" if seen.facts.window is not None else "a bias"
        why = f"{what} needs the places of keys, which a cache with budgets gives with in_place=True"
        raise Reject("AR307", why, site.anchor)
    check_causal(site)


def _check_whole(site: Attention) -> None:
    """Refuse (AR307) all but causal self-attention over whole sequences."""
    facts = site.visibility.facts
    if site.visibility.dense:
        raise Reject(
            "AR307", "selective attention needs a mask it understands; this one is custom", site.anchor, _NEAREST
        )
    if facts.offset is None and same_length(site) and same(site.sizes()["L"], 1):
        return  # one token: it sees itself, which is all there is
    if facts.offset is None:
        if same_length(site):
            raise Reject(
                "AR307",
                "selective attention is defined for causal attention; this one sees all keys",
                site.anchor,
                _NEAREST,
            )
        raise Reject(
            "AR307",
            "selective attention is defined for causal self-attention; here the queries and keys "
            "are different sequences, or the queries continue a cache that does not hold their votes",
            site.anchor,
            _NEAREST,
        )
    if facts.offset != 0 or not same_length(site):
        raise Reject(
            "AR307",
            "the queries continue a cache that does not hold earlier votes; convert() a model of transformers, or call "
            "it with use_cache=False",
            site.anchor,
            _NEAREST,
        )
