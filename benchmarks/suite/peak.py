"""The peak of memory of one attention, forward and backward, in a process of its own: ``python -m suite.peak ...``."""

from __future__ import annotations

import os
import resource
import sys

import torch

from suite.attentions import dense, ours


def main(form: str, name: str, *sizes: str) -> None:
    """Print the peak beyond the inputs, in bytes; a tiny run first loads what is loaded once."""
    H, N, D = map(int, sizes)
    torch.set_num_threads(1)
    for length in (64, N):
        tensors = [torch.randn(1, H, length, D, requires_grad=True) for _ in range(3)]
        before = _resident()
        attend = dense(name, tensors[0]) if form == "dense" else ours(name, tensors[0])
        attend(*tensors).sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(*sys.argv[1:])
