"""Compile the kernels of one provider by running it once, in a process of its own: ``python -m suite.warm CASE NAME``.

What it compiles lies in triton's cache, where the process that measures finds it.
"""

from __future__ import annotations

import sys

import torch

from attnrewrite.bench.case import BACKWARD, Setting
from attnrewrite.functional import kernels
from suite.goals import CASES
from suite.peers import passes, providers


def main(case: str, provider: str) -> None:
    """Run forward and, where it is measured, backward."""
    setting = Setting(CASES[case], torch.device("cuda"), torch.bfloat16, compiled=False, kernels="triton")
    attend = providers(setting.case)[provider]
    with kernels(setting.kernels):
        out = attend.make(setting)(*setting.tensors)
    if not attend.forward_only and BACKWARD in passes(setting.case):
        torch.autograd.grad(out, setting.tensors, setting.upstream, allow_unused=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
