"""Selective attention on a GPU: the votes first, then the dense family with their penalty, and the way back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call, named
from attnrewrite.kernels.dense.launch import Gradients, backward, forward, run
from attnrewrite.kernels.strips import one_head

_ROW = 16
"""Rows of the penalty start at multiples of so many entries, so that a tile is loaded in whole words."""


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Who votes: the selection head; and ``protected`` ``[B or 1, S]``: keys on which nobody may vote."""

    head: int
    protected: Tensor


def selective_forward(call: Call, who: Selection) -> tuple[Tensor, Tensor]:
    """Return what ``forward`` does. ``call`` has a strength."""
    return forward(dataclasses.replace(call, penalty=penalties(call, who)))


def selective_backward(
    call: Call, who: Selection, out: Tensor, lse: Tensor, upstream: Tensor
) -> tuple[Gradients, Tensor]:
    """Return the gradients by query, key and value, and that by the strength."""
    B, H, Hkv, _L, S = call.sizes
    D = call.query.shape[3]
    strength = call.strength
    assert strength is not None
    penalty = penalties(call, who)
    call = dataclasses.replace(call, penalty=penalty)
    found, delta = backward(call, out, lse, upstream)
    selected, by_strength = lse.new_empty(B, S, D), lse.new_empty(B, S)
    # What was the penalty of a pair becomes the gradient by its vote: one tile, one program.
    by_vote = penalty if call.query.dtype == torch.float32 else penalty.view(call.query.dtype)
    more = {
        "DOut": upstream,
        "Lse": lse,
        "Delta": delta,
        "DVotes": by_vote,
        "DSelected": selected,
        "DStrength": by_strength,
        **_protection(call, who),
        "selection_head": who.head,
        **named("g", "bhmd", upstream),
    }
    run("backward_votes", call, more, lambda config: B * -(-S // config.block_n))
    head = who.head // (H // Hkv)
    found.query[:, who.head] += by_vote @ call.key[:, head]
    found.key[:, head] += selected.to(found.key.dtype)
    return found, by_strength.sum().to(strength.dtype)


def penalties(call: Call, who: Selection) -> Tensor:
    """Return F times log2(e), ``[B, L, S]`` with padded rows, in 16 bit for 16-bit inputs."""
    B, H, Hkv, L, S = call.sizes
    dtype = torch.float32 if call.query.dtype == torch.float32 else torch.float16
    penalty = torch.zeros(B, L, -(-S // _ROW) * _ROW, dtype=dtype, device=call.query.device)[:, :, :S]
    query, key = call.query[:, who.head], call.key[:, who.head // (H // Hkv)]
    more = {
        "Q": query,
        "K": key,
        "Penalty": penalty,
        "largest": torch.finfo(dtype).max,
        **_protection(call, who),
        **named("q", "bmd", query),
        **named("k", "bnd", key),
        "stride_pb": penalty.stride(0),
        "stride_pm": penalty.stride(1),
    }
    if call.mask is not None:
        seen = call.mask.view(torch.uint8) if call.mask.dtype == torch.bool else call.mask
        of_head = one_head(seen, who.head).expand(B, 1, L, S)[:, 0]
        more |= {"Mask": of_head, **named("m", "bmn", of_head)}
    if call.slopes is not None:
        more["Slopes"] = call.slopes[who.head]
    run("votes", call, more, lambda config: B * -(-S // config.block_n))
    return penalty


def _protection(call: Call, who: Selection) -> dict[str, object]:
    protected = who.protected.view(torch.uint8).expand(call.query.shape[0], -1)
    return {"Protected": protected, "stride_cb": protected.stride(0)}
