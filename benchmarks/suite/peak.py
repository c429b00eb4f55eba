"""The peak of memory of one attention, forward and backward, in a process of its own: ``python -m suite.peak ...``."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from attnrewrite import functional
from attnrewrite.kernels.selective import reference

CLUSTERS_OF, PIXELS = 128, 128


def attend(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run one causal attention by name, with every extra tensor that it takes."""
    B, H, N, D = query.shape
    extra: Callable[..., Tensor] = torch.randn
    if name == "routing":
        centroids = extra(H, max(1, N // CLUSTERS_OF), D)
        return functional.routing_attention(query, key, value, centroids, is_causal=True, window_size=CLUSTERS_OF)
    if name == "sea":
        estimated = extra(B, H, N, PIXELS)
        return functional.sea_attention(query, key, value, estimated, is_causal=True, budget=64)
    if name == "ssa":
        return functional.ssa_attention(query, key, value, extra(B, H, N), extra(B, H, N), is_causal=True)
    if name == "symmetric":
        return functional.symmetric_attention(key, value, is_causal=True)
    form = reference if name == "selective, dense" else functional
    return form.selective_attention(query, key, value)


def main(name: str, *sizes: str) -> None:
    """Print the peak beyond the inputs, in bytes; a tiny run first loads what is loaded once."""
    H, N, D = map(int, sizes)
    torch.set_num_threads(1)
    for length in (64, N):
        tensors = [torch.randn(1, H, length, D, requires_grad=True) for _ in range(3)]
        before = _resident()
        attend(name, *tensors).sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(*sys.argv[1:])
