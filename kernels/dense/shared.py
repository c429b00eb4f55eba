"""Symmetric attention: calls whose queries are their keys, and the backward pass that uses it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call, named
from attnrewrite.kernels.dense.decode import MOST_QUERIES
from attnrewrite.kernels.dense.launch import Gradients, by_sinks, out_strides, row_blocks, run
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.symmetric.reference import pairwise_query


def paired(
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    how: Options,
    *,
    on_chip: bool = False,
) -> Call:
    """Return the call of symmetric attention; ``on_chip`` leaves the product with ``pair`` to the kernel if it can."""
    if pair is None:
        return Call(shared, shared, value, how, attn_mask, seed=seed)
    fits = pair.dtype == shared.dtype and pair.shape[0] == shared.shape[1]
    if on_chip and fits and shared.shape[2] > MOST_QUERIES:  # what splits keys takes queries as they are
        return Call(shared, shared, value, how, attn_mask, pair=pair.contiguous(), seed=seed)
    return Call(pairwise_query(shared, pair), shared, value, how, attn_mask, seed=seed)


def shares(call: Call) -> bool:
    """Whether every pair is seen both ways, or neither: then one tile of scores serves two tiles of gradients."""
    how = call.how
    plain = not how.is_causal and how.softcap is None and how.slopes is None and how.dropout_p == 0
    return call.query is call.key and call.pair is None and plain and call.mask_kind() in ("none", "keys")


def backward_shared(call: Call, out: Tensor, lse: Tensor, upstream: Tensor) -> Gradients:
    """Return the gradients, all of that by query and key under ``query``."""
    query, value = (x.new_empty(x.shape) for x in (call.query, call.value))
    more: dict[str, Any] = {"Out": out, "Lse": lse, "DOut": upstream, "Delta": torch.empty_like(lse)}
    more |= {**out_strides(out), **named("g", "bhmd", upstream), "DQuery": query, "DValue": value}
    for name in ("delta", "backward_shared"):
        run(name, call, more, lambda config: row_blocks(call, config))
    found = Gradients(query, torch.zeros((), dtype=query.dtype, device=query.device), value)
    found.sinks = None if call.how.sinks is None else by_sinks(call.how.sinks, lse, more["Delta"])
    return found
