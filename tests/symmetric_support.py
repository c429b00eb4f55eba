"""The worked example of symmetric and pairwise attention: D 4, d 2, N 3, no biases."""

from types import SimpleNamespace

import torch

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def worked():
    i, j = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(2, dtype=torch.float64)
    n = torch.arange(3, dtype=torch.float64)[:, None]
    data = SimpleNamespace()
    data.w_q = torch.sin(1 + 0.8 * i + 1.5 * j)
    data.w_k = torch.cos(0.4 + 0.9 * i - 0.6 * j) + 0.5 * data.w_q
    data.x = torch.sin(0.5 + 0.7 * n * (i.T + 1))
    data.value = torch.cos(0.3 * n + 0.5 * j)[None, None].requires_grad_()
    data.upstream = ((n + 1) * (j + 1))[None, None]
    return data
