"""What the tests of generation with a cache share: two sequences, one of them padded, run whole or in pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTH = 14
IDS = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))  # three pads on the left
PLACES = (MASK.cumsum(-1) - 1).clamp(min=0)
REAL = MASK.bool()


def stepwise(model: Any, cache: Any, cuts: tuple[int, ...]) -> Tensor:
    """Return the logits of the real tokens, computed in pieces that end at ``cuts``."""
    out, start = [], 0
    with torch.no_grad():
        for stop in (*cuts, LENGTH):
            given = {"attention_mask": MASK[:, :stop], "position_ids": PLACES[:, start:stop]}
            out.append(model(IDS[:, start:stop], past_key_values=cache, **given).logits)
            start = stop
    return torch.cat(out, 1)[REAL]


def whole(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, attention_mask=MASK, position_ids=PLACES, use_cache=False).logits[REAL]
        return found
