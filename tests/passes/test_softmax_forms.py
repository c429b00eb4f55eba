"""Softmax with more than a softmax: logarithms, exponentials, gates."""

from __future__ import annotations

import pytest
import torch
from compiled import HEADS, WIDTH, Attention, compiled_like_eager, rewritten
from torch import Tensor


class LogSumExp(Attention):
    """Rows without keys: -1e9 swallows the logarithm, and the weights sum to S."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = (q @ k.mT * 0.5).masked_fill((x[..., 0] > 0)[:, None, None], -1e9)
        weights = torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))
        return self.o((weights @ v).transpose(-3, -2).flatten(-2))


def test_a_softmax_that_is_none_on_hidden_rows_fails_its_certificate() -> None:
    x = torch.randn(2, 5, WIDTH)
    x[0, :, 0] = 1.0
    (site,) = compiled_like_eager(LogSumExp(), x)
    assert (site.status, [r.code for r in site.rejections]) == ("rejected", ["AR205"])


class BareExponentials(Attention):
    """A softmax without a maximum taken off."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = torch.exp(q @ k.mT)
        return self.o((weights / weights.sum(-1, keepdim=True) @ v).transpose(-3, -2).flatten(-2))


def test_bare_exponentials() -> None:
    assert rewritten(compiled_like_eager(BareExponentials(), torch.randn(2, 5, WIDTH)))


class Gated(Attention):
    """A factor per head on the weights, and rows without keys set to zero."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu()  # the first row sees nothing
        weights = torch.softmax((q @ k.mT * 0.5).masked_fill(hidden, -1e9), -1).masked_fill(hidden, 0.0)
        weights = weights * torch.sigmoid(x[..., :HEADS]).mT[..., None]
        return self.o((weights @ v).transpose(-3, -2).flatten(-2))


def test_gated_weights_and_zeroed_rows() -> None:
    (site,) = compiled_like_eager(Gated(), torch.randn(2, 5, WIDTH))
    assert (site.status, site.mask.kind, site.mask.offset) == ("rewritten", "causal", -1)
    assert "gated weights" in site.spelling


class ZeroedBesideABias(Attention):
    """A finite fill whose keys are zeroed once more, and a bias that is added before it."""

    products = True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        places = self.split(self.k(torch.ones(1, 3, WIDTH).cumsum(1)))
        near = (q @ places.mT / 2).gather(-1, torch.arange(x.shape[1]).remainder(3).expand(*q.shape[:-1], x.shape[1]))
        hidden = (x[..., 0] > 0)[:, None, None]
        scores = q @ k.mT * 0.5 + (near if self.products else x[:, None, :, :1].mT)
        weights = torch.softmax(scores.masked_fill(hidden, -1e30), -1).masked_fill(hidden, 0.0)
        return self.o((weights @ v).transpose(-3, -2).flatten(-2))


@pytest.mark.parametrize("products", [True, False])
def test_only_a_bias_that_is_like_scores_stands_beside_a_fill_that_is_zeroed(products: bool) -> None:
    """A bias that is given may be as low as the fill, and the keys that it hides would get weight."""
    model, x = ZeroedBesideABias(), torch.randn(2, 5, WIDTH)
    model.products = products
    x[0, :, 0] = 1.0  # all keys are hidden
    (site,) = compiled_like_eager(model, x)
    assert site.status == ("rewritten" if products else "rejected")
    assert [r.code for r in site.rejections] == ([] if products else ["AR203"])
