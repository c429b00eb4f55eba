"""Few queries and many keys: the keys are split among programs, so that one sequence fills a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.launch import run
from attnrewrite.kernels.dense.splits import split

MOST_QUERIES = 16


class Voting(NamedTuple):
    """What one query needs to vote: see ``templates/decode.py``."""

    earlier: Tensor
    protected: Tensor
    position: Tensor | None
    head: int
    received: Tensor


def few(call: Call) -> bool:
    """Whether to split the keys."""
    return call.sizes[3] <= MOST_QUERIES and call.how.dropout_p == 0


def decode(call: Call, voting: Voting | None = None) -> tuple[Tensor, Tensor]:
    """Return what ``launch.forward`` does. With ``voting``, whose ``received`` is written, there is one query."""
    B, H, Hkv, L, S = call.sizes
    Dv = call.value.shape[3]
    splits, share = split(B * Hkv, S, _processors(call.query.device))
    lse = call.query.new_empty(B, H, L, dtype=torch.float32)
    out = call.query.new_empty(B, H, L, Dv)
    more: dict[str, Any] = {
        "Parts": lse.new_empty(B, H, L, splits, Dv),
        "PartLse": lse.new_empty(B, H, L, splits),
        "Out": out,
        "Lse": lse,
        "rows": B * H * L,
        "splits": splits,
        "share": share,
    }
    flags: dict[str, bool | int | str] = {}
    if voting is not None:
        protected = voting.protected.view(torch.uint8).expand(B, -1)
        flags = {"VOTES": True, "PLACED": voting.position is not None}
        more |= {"Earlier": voting.earlier, "Received": voting.received, "Position": voting.position}
        more |= {"Protected": protected, "stride_cb": protected.stride(0), "selection_head": voting.head}
    run("decode", call, more, lambda config: B * Hkv * splits * -(-H // Hkv * L // config.block_m), flags)
    run("merge", call, more, lambda config: -(-B * H * L // config.block_m))
    return out, lse


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
