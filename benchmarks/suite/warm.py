"""Compile the kernels of one provider by running it once, in a process of its own: ``python -m suite.warm CASE NAME``.

What it compiles lies in triton's cache, where the process that measures finds it.
"""

from __future__ import annotations

import sys

import torch

from suite.goals import CASES
from suite.peers import FORWARD_ONLY, Setting, providers


def main(case: str, provider: str) -> None:
    """Run forward and, where it is measured, backward."""
    setting = Setting(CASES[case], torch.device("cuda"), torch.bfloat16, compiled=False)
    out = providers(setting.case)[provider](setting)()
    if provider not in FORWARD_ONLY:
        torch.autograd.grad(out, setting.tensors, setting.upstream)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
