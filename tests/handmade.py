"""Attention written by hand, with places to change its queries, keys and scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attnrewrite.explanation import explain
from attnrewrite.passes.report import Projection, Site

B, L, H, D = 2, 7, 4, 8
WIDTH = H * D
Change = Callable[["Layer", Tensor], Tensor]


def same(layer: Layer, x: Tensor) -> Tensor:
    return x


class Layer(nn.Module):
    """Attention whose queries and keys [B, H, L, D] and scores pass through ``query``, ``key`` and ``scores``."""

    def __init__(self, query: Change = same, key: Change | None = None, scores: Change = same) -> None:
        super().__init__()
        self.change_query, self.change_key, self.change_scores = query, key or query, scores
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(D)
        self.table = nn.Parameter(torch.randn(H, 2 * L - 1))
        self.dense = nn.Parameter(torch.randn(H, L, L))
        self.to_bias = nn.Linear(WIDTH, H)
        angles = torch.arange(L)[:, None] * 0.5 ** torch.arange(D // 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.change_scores(self, q @ k.mT * D**-0.5)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.change_query(self, self.heads(self.q(x))), self.change_key(self, self.heads(self.k(x)))
        return self.attend(q, k, self.heads(self.v(x)))


def only(model: nn.Module, *inputs: Tensor) -> Site:
    torch.manual_seed(0)
    (site,) = explain(model.eval(), *(inputs or (torch.randn(B, L, WIDTH),))).sites
    assert site.status == "matched"
    return site


def made(site: Site, role: str) -> Projection:
    found = site.projections[role]
    assert found is not None
    return found


def halves(layer: Layer, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * layer.cos - b * layer.sin, b * layer.cos + a * layer.sin), -1)
