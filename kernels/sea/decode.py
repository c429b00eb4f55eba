"""Causal SEA attention for tokens that follow earlier ones: prefill and single steps are the same function.

What is kept of the earlier tokens, beside keys and values, does not grow with their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.sea.arguments import check_padding, check_rule, key_padding
from attnrewrite.kernels.sea.estimator import Estimator, SEAState, Trace, traced_estimate
from attnrewrite.kernels.sea.pooling import visible_mean
from attnrewrite.kernels.sea.reference import mixed
from attnrewrite.kernels.sea.slices import Rule, visible_rows
from attnrewrite.kernels.sea.step import sparse_step
from attnrewrite.kernels.visibility import accumulation_dtype, check_attention, full_precision


def sea_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimator: Estimator,
    state: SEAState | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    budget: int,
    budget_rule: str = "exact",
    grouping: str = "causal_per_batch",
    strict_window: bool = True,
) -> tuple[Tensor, SEAState]:
    """Return causal SEA attention of the last T of S tokens, estimate included, and the state to go on from.

    Any way of cutting a sequence into calls gives what one call gives (arXiv 2310.01777, section 3).

    Args:
        query: ``[B, H, T, D]`` of the new tokens, any floating-point dtype, as the scores see it.
        key: ``[B, Hkv, S, D]`` of all tokens, the cache and the new ones.
        value: ``[B, Hkv, S, Dv]``.
        estimator: causal.
        state: what the call for the S - T earlier tokens returned; None if T = S.
        attn_mask: padding, or a bias that broadcasts to ``[B, H, T, S]``, as in ``sea_attention``.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H.
        window: as in ``sea_attention``.
        budget: keys per query and head.
        budget_rule: "exact" or "paper".
        grouping: "causal_per_batch" or "per_query".
        strict_window: as in ``sea_attention``.

    Returns:
        ``[B, H, T, Dv]`` in the dtype of ``query``, and the new state.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    rule = Rule(budget, budget_rule, grouping)
    check_attention(query, key, value, attn_mask, is_causal=True, enable_gqa=enable_gqa, window=window)
    check_rule(rule, window, strict_window)
    check_padding(attn_mask)
    T, S = query.shape[2], key.shape[2]
    _check_state(T, S, state)
    padding, bias = key_padding(attn_mask, S)
    fresh = key[:, :, S - T :], value[:, :, S - T :]
    out, after, _ = continued(
        query, key, value, *fresh, estimator, state, padding, bias, rule=rule, scale=scale, window=window
    )
    return out, after


def continued(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    estimator: Estimator,
    state: SEAState | None,
    padding: Tensor | None,
    bias: Tensor | None,
    *,
    rule: Rule,
    scale: float | None = None,
    window: int | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, SEAState, Trace]:
    """Compute ``sea_decode``, unchecked, for T new tokens that stand anywhere among S, and what each did to the state.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, Hkv, S, D]``, those of the new tokens among them.
        value: ``[B, Hkv, S, Dv]``.
        fresh_key: ``[B, Hkv, T, D]``.
        fresh_value: ``[B, Hkv, T, Dv]``.
        estimator: causal.
        state: of the earlier tokens; None, or zeros, if there is none.
        padding: boolean ``[B or 1, S]``, False at padding and where no token is yet; None if all are real.
        bias: ``[B or 1, H or 1, T or 1, S]``.
        rule: budget, counting and grouping.
        scale: factor of the logits; ``D ** -0.5`` if None.
        window: as in ``sea_attention``.
        position: a number, where the first new token stands in a cache of fixed size; ``S - T`` if None.
    """
    (T, D), S = query.shape[2:], key.shape[2]
    rows = visible_rows(T, S, is_causal=True, window=window, padding=padding, device=query.device, first=position)
    real = rows.real.index_select(1, torch.arange(T, device=query.device) + (S - T if position is None else position))
    estimate, estimator_state, trace = traced_estimate(
        query, fresh_key, fresh_value, estimator, real, None if state is None else state.estimator, earlier=S - T
    )
    factor = D**-0.5 if scale is None else scale
    sparse = sparse_step(query, key, value, estimate.estimated, bias, padding, position, factor, window, *rule)
    with full_precision(query.device):
        dtype = accumulation_dtype(query.dtype)
        kept = fresh_value.to(dtype).masked_fill(~real[:, None, :, None], 0.0).cumsum(2)
        sums = kept if state is None else state.values.unsqueeze(2) + kept  # [B, Hkv, T, Dv]
        if window is None:
            pooled = sums / rows.count.clamp(min=1)[:, None, :, None]
        else:
            pooled = visible_mean(value.to(dtype), rows)
        out = mixed(sparse, pooled, rows, estimate.scale_prob, estimate.mix).to(query.dtype)
    return out, SEAState(estimator_state, sums[:, :, -1]), trace


def _check_state(T: int, S: int, state: SEAState | None) -> None:
    if T > S:
        raise error("AR402", f"query has {T} positions and key {S}; key holds the new tokens, too", hint="")
    if (state is None) != (T == S):
        given = "no state" if state is None else "a state"
        raise error(
            "AR402",
            f"query has {T} of {S} positions, and there is {given}",
            hint="pass no state for a whole sequence, and what the last call returned for what follows it",
        )
