"""The arguments of SEA attention: what fits together, and which masks are padding."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.sea.slices import Rule
from attnrewrite.kernels.visibility import check_attention, check_broadcast, check_shape, four_dimensional

_CHOICES = {
    "budget_rule": ("exact", "paper"),
    "grouping": ("causal_per_batch", "per_query"),
    "pooling": ("width", "paper"),
}


def key_padding(attn_mask: Tensor | None, S: int, padding: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into padding, boolean ``[B or 1, S]``, and a bias of four dimensions; either may be None.

    ``padding`` is what is known beside the mask, of the same kind.
    """
    if attn_mask is None:
        return padding, None
    mask = four_dimensional(attn_mask)
    if mask.dtype == torch.bool:
        return _both(mask[:, 0, 0].expand(-1, S), padding), None
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        return padding, mask
    real = mask != float("-inf")
    return _both(real[:, 0, 0].expand(-1, S), padding), mask.masked_fill(~real, 0.0)


def _both(real: Tensor, padding: Tensor | None) -> Tensor:
    return real if padding is None else real & padding


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    window: int | None,
    rule: Rule,
    scale_prob: Tensor | None,
    mix: Tensor | None,
    strict_window: bool,
    padding: Tensor | None,
    pooling: str,
) -> None:
    """Raise AR402 unless the arguments of ``sea_attention`` fit together."""
    check_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        window=window,
    )
    L, S = query.shape[2], key.shape[2]
    if L != S:
        raise error(
            "AR402",
            f"query has {L} positions and key {S}; the slices need the two to be one sequence",
            hint="for queries that follow a cache use sea_decode",
        )
    check_estimated(query, estimated)
    check_rule(rule, window, strict_window)
    check_padding(attn_mask, padding)
    if padding is not None:
        check_broadcast("padding", padding, (query.shape[0], L))
    _check_choice("pooling", pooling)
    for name, tensor in (("scale_prob", scale_prob), ("mix", mix)):
        if tensor is not None:
            _check_factor(query, name, tensor)


def check_estimated(query: Tensor, estimated: Tensor) -> None:
    """Raise AR402 unless the estimate has a row for every query, and a column at least."""
    if estimated.dim() != 4 or estimated.shape[-1] == 0:
        size = " x ".join(str(n) for n in estimated.shape)
        raise error("AR402", f"estimated is {size}; needed is B x H x L x M with M of 1 or more", hint="")
    check_shape("estimated", estimated, "B x H x L x M", (*query.shape[:3], estimated.shape[-1]))
    if estimated.device != query.device:
        raise error("AR402", f"query is on {query.device} and estimated on {estimated.device}", hint="")


def check_rule(rule: Rule, window: int | None, strict_window: bool) -> None:
    """Raise AR402 unless budget, rule, grouping and window are possible."""
    if isinstance(rule.budget, bool) or not isinstance(rule.budget, int) or rule.budget < 1:
        raise error("AR402", f"budget is {rule.budget!r}; it is a number of keys, 1 at least", hint="")
    _check_choice("budget_rule", rule.counting)
    _check_choice("grouping", rule.grouping)
    if window is not None and strict_window:
        raise error(
            "AR402",
            f"window is {window} and strict_window is True: an estimate made from running sums also holds keys "
            "behind the window, so they decide which keys are selected",
            hint="pass strict_window=False to let them, or no window",
        )


def _check_choice(name: str, given: str) -> None:
    if given not in _CHOICES[name]:
        known = " or ".join(repr(choice) for choice in _CHOICES[name])
        raise error("AR402", f"{name} is {given!r}; it must be {known}", hint="")


def check_padding(attn_mask: Tensor | None, padding: Tensor | None = None) -> None:
    """Raise AR402 if a boolean mask tells more than which tokens are padding, or ``padding`` is none."""
    if padding is not None and (padding.dtype != torch.bool or padding.dim() != 2):
        size = " x ".join(str(n) for n in padding.shape)
        raise error("AR402", f"padding is {size} of {padding.dtype}; needed is B x L of torch.bool", hint="")
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return
    _, heads, queries, _ = four_dimensional(attn_mask).shape
    if heads != 1 or queries != 1:
        raise error(
            "AR402",
            f"attn_mask is boolean for {heads} heads and {queries} queries; needed is 1 and 1, because slices are "
            "cut from keys that differ between queries by is_causal and window alone",
            hint="pass padding as [B, 1, 1, L], and is_causal=True in place of a causal mask",
        )


def _check_factor(query: Tensor, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise error("AR402", f"{name} has dtype {tensor.dtype}; needed is a float dtype", hint="")
    if tensor.device != query.device:
        raise error("AR402", f"query is on {query.device} and {name} on {tensor.device}", hint="")
    check_broadcast(name, tensor, tuple(query.shape[:3]))
