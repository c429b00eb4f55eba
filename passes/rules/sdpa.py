"""The exact rewrite: the site becomes fused attention and never changes meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.passes.attention.form import NEGLIGIBLE, Attention, Reject, Sink
from attnrewrite.passes.attention.sinks import per_head
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.graph.axes import flat, symbols
from attnrewrite.passes.rules.base import Request


class SdpaRule:
    """Exact attention through ``scaled_dot_product_attention``, with the recovered flags in place of dense masks.

    Sinks, which torch's operator does not take, go to ours.
    """

    variant = "sdpa"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse active dropout (AR206), what no fused operator computes (AR401), and what is fused (AR404)."""
        if site.dropout > 0:
            raise Reject("AR206", f"the attention weights pass through dropout with p = {site.dropout:g}", site.output)
        if site.scores.softcap is not None:
            raise Reject("AR401", "torch's fused attention has no soft-cap", site.anchor)
        check_terms(site)
        if already_fused(site):
            raise Reject("AR404", "the model calls fused attention itself", site.anchor)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Nothing beside the site's own tensors."""
        return {}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return fused attention on the canonical tensors."""
        return exact


def exact(t: SiteTensors) -> torch.Tensor:
    """Compute the site's own attention, [B, H, L, Dv]; a soft cap is never in a rewrite, but in what is observed."""
    q, k, v = common_dtype(t.query(), t.key(), t.attended())
    if t.site.scores.sink is not None and per_head(t.site) is None:
        return _beside_a_key(t, t.site.scores.sink, q, k, v)
    out = attention(q, k, v, **attention_arguments(t, q.dtype))
    return empty_rows(t, out, q, k, v, forward=t.site.scores.softcap is not None)


def _beside_a_key(t: SiteTensors, sink: Sink, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend with a sink of any shape: to one more key, all 0 like its value, whose bias is the sink."""
    mask, shape = t.written_mask(q.dtype), (q.shape[0], q.shape[1], t.length)
    if mask is None or mask.dtype == torch.bool:
        hidden = torch.zeros(1, dtype=torch.bool, device=q.device) if mask is None else ~mask
        mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, float("-inf"))
    column = t.sink_column(sink).to(q.dtype)
    bias = torch.cat([mask.expand(*shape, t.width), column.expand(*shape, 1)], -1)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    scores = t.site.scores
    return attention(q, k, v, bias, scale=scores.alpha, enable_gqa=t.grouped, softcap=scores.softcap)


def check_terms(site: Attention) -> None:
    """Refuse what no additive mask can express, and sinks that are not one number per head."""
    sink = site.scores.sink
    if sink is not None and per_head(site) is None:
        detail = "the sink may differ by query or by sequence; operators take one number per head"
        raise Reject("AR401", detail, sink.node, "a sink of one number per head, which no input decides")
    for term in site.scores.terms:
        if term.kind == "fill" and term.value > NEGLIGIBLE:
            raise Reject(
                "AR401",
                f"a fill of {term.value:g} still lets masked keys through",
                term.node,
            )
    if site.scores.alpha <= 0:
        raise Reject("AR401", f"the scale {site.scores.alpha:g} is not positive", site.anchor)


def already_fused(site: Attention) -> bool:
    """Whether the model calls the fused operator and nothing about the call can be improved."""
    if site.output is not site.anchor:
        return False
    simpler = bool(site.scores.terms) and plain_flags(site) is not None
    repeated = bool(site.groups) and not site.anchor.kwargs.get("enable_gqa", False)
    return not simpler and not repeated


def plain_flags(site: Attention) -> bool | None:
    """Return is_causal where the masks are nothing but "all visible" or "causal, top-left", else None."""
    seen = site.visibility
    if seen.bias or seen.padding or seen.dense or seen.documents or seen.facts.window is not None:
        return None
    if seen.facts.kind == "none":
        return False
    return True if seen.facts.kind == "causal" and seen.facts.offset == 0 else None


def attention_arguments(t: SiteTensors, dtype: torch.dtype) -> dict[str, Any]:
    """Return what ``attention`` takes beside the tensors of a site, but for dropout."""
    mask, is_causal, window = mask_arguments(t, dtype)
    return {
        "attn_mask": mask,
        "is_causal": is_causal,
        "window": window,
        "scale": t.site.scores.alpha,
        "enable_gqa": t.grouped,
        "softcap": t.site.scores.softcap,
        "sinks": t.sinks(),
    }


def mask_arguments(t: SiteTensors, dtype: torch.dtype) -> tuple[torch.Tensor | None, bool, int | None]:
    """Return (attn_mask, is_causal, window) for the site."""
    flag, facts = plain_flags(t.site), t.site.visibility.facts
    if flag is not None:
        return None, flag, None
    if not _named_apart(t.site):
        return t.written_mask(dtype), False, None
    mask = t.beside_positions()
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    return mask, facts.offset is not None, facts.window


def _named_apart(site: Attention) -> bool:
    """Whether what positions hide goes by its name, beside the rest of the masks and biases, and not in one with them.

    With sinks it does: rows without visible keys give 0, however they are masked. And it does where a bias has one row
    for all queries, such as ALiBi's, which together with a causal mask would have a row for each.
    """
    seen = site.visibility
    if seen.dense or seen.facts.offset not in (None, 0):
        return False
    if site.scores.sink is not None:
        return True
    rows = set(flat(site.rows))
    one_row = bool(seen.bias) and not any(rows & set(symbols(term.layout)) for term in seen.bias)
    return one_row and seen.facts.kind == "causal" and seen.rows_never_empty and seen.bias_is_small


def common_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Bring operands to their widest dtype: a model may upcast queries and keys only."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in tensors)


def empty_rows(
    t: SiteTensors,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    forward: bool = False,
) -> torch.Tensor:
    """Give rows without visible keys what the model gives them, values and gradients.

    With -inf as fill that is NaN. With a finite fill it is the mean of all values. Given the model's own mask the fused
    operator computes that too (``forward`` says that ``out`` does not), but its backward rebuilds the weights of such a
    row from a log-sum that the fill has swallowed.
    """
    seen = t.site.visibility
    if seen.empty_rows == "zero" or seen.rows_never_empty:
        return out
    visible = t.visible()
    if visible is None or (seen.empty_rows == "uniform" and not (forward or torch.is_grad_enabled())):
        return out
    some = visible.any(-1, keepdim=True)  # [B|1, H|1, L|1, 1]
    if seen.empty_rows == "nan":
        return _not_a_number(t, out, some, v)
    return torch.where(some, out, _uniform(t, q, k, v))


def _not_a_number(t: SiteTensors, out: torch.Tensor, some: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Make rows without visible keys NaN, and with them the gradients that pass through them in the model.

    What a mask adds to is NaN behind the softmax; what it fills is a constant, so that only the values are reached.
    """
    nothing = torch.where(some, 0.0, float("nan")).to(out.dtype)
    if any(term.kind == "add" for term in t.site.visibility.terms):
        return out * (nothing + 1.0)
    mean = v.mean(-2, keepdim=True)  # [B, Hkv, 1, Dv]
    mean = mean.repeat_interleave(out.shape[1] // v.shape[1], 1) if t.grouped else mean
    return torch.where(some, out, 0.0) + mean * nothing


def _uniform(t: SiteTensors, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend uniformly, [B, H, L, Dv], with the gradient of softmax at equal scores.

    To first order softmax(s)·v = v̄ + α Σ_j (q·k_j) (v_j - v̄) / S: the second term carries the gradient to q and k and
    takes no part in the value. It passes what a mask adds to, not what a mask fills: filled scores are constants.
    """
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    mean = v.mean(-2, keepdim=True)  # [B, H, 1, Dv]
    filled, added = t.filled(), any(term.kind == "add" for term in t.site.visibility.terms)
    if not added:
        return mean.expand(*q.shape[:-1], v.shape[-1])
    fixed = (v - mean).detach() / v.shape[-2]
    if filled is None:
        slope = t.site.scores.alpha * (q @ (k.mT @ fixed))
    else:
        slope = t.site.scores.alpha * ((q @ k.mT).masked_fill(filled, 0.0) @ fixed)
    return mean + (slope - slope.detach())
