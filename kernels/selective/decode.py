"""Selective attention with a cache: keys and values, and beside them the votes that every key has received."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.selective.reference import check_selection, check_selector
from attnrewrite.kernels.selective.step import step
from attnrewrite.kernels.visibility import accumulation_dtype, check_attention


@dataclass(frozen=True)
class SelectionState:
    """What a step leaves to the next beside keys and values.

    ``votes`` ``[B, S]`` in float32 (float64 for float64 inputs) are those that each key has received, infinite for a
    key that was evicted; ``protected`` ``[B, S]`` are the keys on which nobody may vote. To drop keys from the cache,
    index both as the cache is indexed.
    """

    votes: Tensor
    protected: Tensor

    def kept(self, index: Tensor) -> SelectionState:
        """Return the state of the keys ``index`` ``[B, K]``, in that order."""
        return SelectionState(self.votes.gather(1, index), self.protected.gather(1, index))

    def reordered(self, beams: Tensor) -> SelectionState:
        """Return the state of the sequences ``beams`` ``[B]``, as beam search reorders a cache."""
        return SelectionState(self.votes.index_select(0, beams), self.protected.index_select(0, beams))


def selective_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: SelectionState | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    selection_head: int = 0,
    gamma: float | Tensor = 1.0,
    protect_first: bool = True,
    softcap: float | None = None,
    budget: int | None = None,
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, SelectionState]:
    """Attend with the newest L of S tokens; causal selective attention (arXiv 2410.02703) step by step.

    Any cut of a sequence into steps gives what ``selective_attention`` gives for the whole: the penalty of key j for
    query i is the sum of the votes of the queries before i, and the state holds those of earlier steps.

    Args:
        query: ``[B, H, L, D]``, the tokens at positions S - L to S - 1.
        key: ``[B, Hkv, S, D]``, cached and new ones.
        value: ``[B, Hkv, S, Dv]``.
        state: what the step before returned, for S - L keys; None in the first step.
        attn_mask: boolean (True = visible), broadcastable to ``[B, 1, L, S]``, or a bias, to ``[B, H, L, S]``.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H.
        window: query at position i sees key j, and may vote on it, iff also i - j < window.
        selection_head: the query head whose logits are the votes.
        gamma: number or 0-d tensor; strength of the votes.
        protect_first: False lets queries vote on every key but their own.
        softcap: bounds the logits before bias, mask and votes.
        budget: how many keys may be attended to, at least 2. When a new key makes them more, the one with the largest
            penalty is evicted for good before its query attends: never the new key nor a protected one, the oldest
            among equals. A key that its own query does not see, such as padding, counts as evicted, and so does one
            that a later query does not see, such as one that has left the window.
        vote_query: ``[B, L, Ds]``, with ``vote_key`` a selector of its own, as in ``selective_attention``.
        vote_key: ``[B, S, Ds]``, cached and new ones.
        sinks: ``[H]``, as in ``selective_attention``.
        alibi_slopes: ``[H]``, as in ``selective_attention``.

    Returns:
        The output ``[B, H, L, Dv]`` in the dtype of ``query``, and the state for S keys. Both are differentiable in
        every float input, the votes of ``state`` included, except with a budget.

    Raises:
        LoweringError: AR402, arguments that do not fit together, and gradients with a budget.
    """
    check_attention(
        query,
        key,
        value,
        attn_mask,
        is_causal=True,
        enable_gqa=enable_gqa,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    check_selection(query, attn_mask, selection_head, gamma)
    check_selector(query, key, vote_query, vote_key)
    (B, _, L, D), S = query.shape, key.shape[2]
    _check_state(state, B, L, S)
    if budget is not None and budget < 2:
        raise error("AR402", f"budget is {budget}; it takes at least 2, the first key and the newest", hint="")
    dtype = accumulation_dtype(query.dtype)
    strength = gamma if isinstance(gamma, Tensor) else query.new_full((), gamma, dtype=dtype)
    votes = query.new_zeros(B, S, dtype=dtype)
    protected = torch.zeros(B, S, dtype=torch.bool, device=query.device)
    if state is not None:
        votes = torch.cat((state.votes.to(dtype), votes[:, S - L :]), dim=1)
        protected = torch.cat((state.protected, protected[:, S - L :]), dim=1)
    limit = None if budget is None else torch.tensor(budget)
    factor = D**-0.5 if scale is None else scale
    out, received, protected = step(
        query,
        key,
        value,
        strength,
        votes,
        protected,
        attn_mask,
        None,
        None,
        limit,
        factor,
        0.0,
        window,
        softcap,
        selection_head,
        protect_first,
        vote_query,
        vote_key,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    return out, SelectionState(received.squeeze(1), protected)


def _check_state(state: SelectionState | None, B: int, L: int, S: int) -> None:
    if L > S:
        raise error("AR402", f"query has {L} positions and key {S}; the queries are the newest of the keys")
    if state is None and L < S:
        raise error(
            "AR402",
            f"{S - L} of {S} keys are older than the queries, and there is no state of theirs",
            hint="pass the state that the step before returned; in the first step query and key are of one length",
        )
    if state is not None and state.votes.shape != (B, S - L):
        has = " x ".join(map(str, state.votes.shape))
        raise error("AR402", f"state is for {has} keys; needed is B x (S - L) = {B} x {S - L}")
