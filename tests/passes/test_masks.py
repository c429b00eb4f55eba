"""Masks by evaluation: predicates on the whole grid, padding factored out, packed documents, and honest fall-backs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compiled import compiled_like_eager
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.masks.classify import name_grid
from attnrewrite.passes.report import Mask, Site

T = 13


def grid(condition: Any, rows: int = 7, cols: int = 9) -> Tensor:
    i, j = torch.arange(rows)[:, None], torch.arange(cols)[None]
    return torch.as_tensor(condition(i, j)).expand(rows, cols)


@pytest.mark.parametrize(
    ("condition", "mask"),
    [
        (lambda i, j: i >= -1, Mask("none")),
        (lambda i, j: j <= i, Mask("causal", offset=0)),
        (lambda i, j: j <= i + 2, Mask("causal", offset=2)),
        (lambda i, j: j <= i - 1, Mask("causal", offset=-1)),
        (lambda i, j: (j <= i) & (j > i - 3), Mask("window", offset=0, window=3)),
        (lambda i, j: (j <= i + 2) & (j > i - 2), Mask("window", offset=2, window=4)),
        (lambda i, j: (j <= i) & (j != 3), None),
        (lambda i, j: (i + j) % 2 == 0, None),
        (lambda i, j: (j <= i) | (j < 2), None),
        (lambda i, j: j > 99, None),
    ],
)
def test_a_grid_is_named_only_if_equal_everywhere(condition: Any, mask: Mask | None) -> None:
    assert name_grid(grid(condition)) == mask


class Masked(nn.Module):
    """Attention [B, T, C] with additive or filled scores; ``mask`` builds the mask from x."""

    def __init__(self, mask: Any, fill: bool = False, value: float = -math.inf) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.mask, self.fill, self.value = mask, fill, value
        self.register_buffer("seen", torch.ones(T, T).tril().bool())

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / 4
        mask = self.mask(self, x, extra)
        scores = scores.masked_fill(mask, self.value) if self.fill else scores + mask
        return torch.softmax(scores, -1) @ self.v(x)


def site_of(model: nn.Module, *inputs: Any) -> Site:
    (site,) = attnrewrite.explain(model, *inputs).sites
    assert site.certificate == "proved"
    return site


X = torch.randn(2, T, 16)


def test_a_buffer_is_read() -> None:
    assert site_of(Masked(lambda m, x, e: ~m.seen, fill=True), X).mask.kind == "causal"


def test_a_small_fill_is_no_mask_but_a_bias() -> None:
    site = site_of(Masked(lambda m, x, e: torch.zeros(T, T).masked_fill(~m.seen, -100.0)), X)
    assert site.mask.kind == "none"
    assert site.bias


def test_an_input_mask_stays_a_tensor() -> None:
    additive = site_of(Masked(lambda m, x, e: e), X, torch.zeros(T, T))
    assert (additive.mask.kind, len(additive.bias)) == ("none", 1)
    filled = site_of(Masked(lambda m, x, e: e, fill=True), X, torch.zeros(T, T, dtype=torch.bool))
    assert (filled.mask.kind, filled.bias) == ("custom", [])


@pytest.mark.parametrize("fill", [-math.inf, -1e30])
def test_a_row_is_empty_where_a_named_and_another_mask_leave_nothing_together(fill: float) -> None:
    """Either one alone leaves the first query a key."""
    other = torch.zeros(2, T, T, dtype=torch.bool)
    other[:, 0, 0] = True
    (site,) = compiled_like_eager(Masked(lambda m, x, e: ~m.seen | (e & (x[..., :1] > -9)), True, fill), X, other)
    assert (site.status, site.mask.kind) == ("rewritten", "custom")


def test_padding_is_factored_out_of_a_conjunction() -> None:
    def mask(m: Masked, x: Tensor, keep: Tensor) -> Tensor:
        return ~(m.seen & keep[:, None, :])

    site = site_of(Masked(mask, fill=True), X, torch.ones(2, T, dtype=torch.bool))
    assert (site.mask.kind, site.mask.padding, site.mask.offset) == ("causal+padding", True, 0)


@pytest.mark.parametrize("inverted", [False, True])
def test_an_additive_mask_cast_to_booleans_hides_what_it_takes_off(inverted: bool) -> None:
    def mask(m: Masked, x: Tensor, keep: Tensor) -> Tensor:
        seen = m.seen & keep[:, None, :]
        taken = torch.where(~seen, 0.0, -1e9) if inverted else torch.where(seen, 0.0, -1e9)
        return ~taken.bool() if inverted else taken.to(torch.bool)

    site = site_of(Masked(mask, fill=True, value=-1e9), X, torch.ones(2, T, dtype=torch.bool))
    assert (site.mask.kind, site.mask.padding, site.mask.offset) == ("causal+padding", True, 0)


def test_two_masks_add_up() -> None:
    def mask(m: Masked, x: Tensor, e: Any) -> Tensor:
        window = torch.full((T, T), -math.inf).tril(-4)
        return torch.where(m.seen, 0.0, -math.inf) + window

    assert site_of(Masked(mask), X).mask.kind == "window"


@pytest.mark.parametrize("how", ["added", "filled"])
def test_a_bias_beside_a_mask_is_told_apart(how: str) -> None:
    def mask(m: Masked, x: Tensor, bias: Tensor) -> Tensor:
        if how == "filled":
            return bias.masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf)
        return bias + torch.full((T, T), -math.inf).triu(1)

    site = site_of(Masked(mask), X, torch.randn(T, T))
    assert (site.mask.kind, len(site.bias)) == ("causal", 1)


def packed(positions: Tensor) -> Tensor:
    """Say which pairs are visible, as transformers builds it from position ids."""
    documents = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    n = torch.arange(positions.shape[1])
    batch = torch.arange(positions.shape[0])[:, None, None]
    same = documents[batch, n[None, :, None]] == documents[batch, n[None, None, :]]
    return same & (positions[batch, n[None, None, :]] <= positions[batch, n[None, :, None]])


def test_packed_documents_are_causal_whatever_the_data() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]] * 2)
    site = site_of(Masked(lambda m, x, p: ~packed(p), fill=True), X, positions)
    assert site.mask.kind == "causal+documents"
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    for seed in range(20):  # the theorem that the name rests on: visible means earlier and same document
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, 3, (2, T), generator=generator) == 0
        steps = torch.where(starts, torch.randint(-4, 9, (2, T), generator=generator), 1)
        anything = steps.cumsum(-1)
        assert not (packed(anything) & (j > i)).any()


def test_a_window_that_is_counted_by_positions_is_one_within_the_document() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]] * 2)

    def near(p: Tensor, width: int) -> Tensor:
        n, batch = torch.arange(p.shape[1]), torch.arange(p.shape[0])[:, None, None]
        return p[batch, n[None, None, :]] > p[batch, n[None, :, None]] - width

    site = site_of(Masked(lambda m, x, p: ~(packed(p) & near(p, 3)), fill=True), X, positions)
    assert (site.mask.kind, site.mask.window) == ("window+documents", 3)
    both = site_of(Masked(lambda m, x, p: ~(packed(p) & near(p, 3) & near(p, 2)), fill=True), X, positions)
    assert both.mask.window == 2
    others = site_of(Masked(lambda m, x, p: ~(packed(p) & near(p + p, 3)), fill=True), X, positions)
    assert others.mask.kind == "custom"
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    for seed in range(20):  # the theorem that the name rests on
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, 4, (2, T), generator=generator) == 0
        anything = torch.where(starts, torch.randint(-4, 9, (2, T), generator=generator), 1).cumsum(-1)
        assert torch.equal(packed(anything) & near(anything, 3), packed(anything) & (j > i - 3))


@pytest.mark.parametrize("causal", [True, False])
def test_equal_numbers_under_a_causal_mask_are_documents(causal: bool) -> None:
    """Numbers of documents, however they are written; without a causal mask they stay a custom one."""
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 5, 5]] * 2)

    def hidden(m: Masked, x: Tensor, n: Tensor) -> Tensor:
        same = n[:, :, None] == n[:, None, :]
        i = torch.arange(x.shape[1])
        return ~(same & (i[None, :] <= i[:, None])) if causal else ~same

    site = site_of(Masked(hidden, fill=True), X, numbers)
    assert site.mask.kind == ("causal+documents" if causal else "custom")
    heads = site_of(Masked(lambda m, x, n: ~(n.float()[:, :, None] == n.float()[:, None, :]), fill=True), X, numbers)
    assert heads.mask.kind == "custom"


def test_order_alone_is_not_taken_for_causal() -> None:
    def mask(m: Masked, x: Tensor, p: Tensor) -> Tensor:
        return ~(p[:, None, :] <= p[:, :, None])

    site = site_of(Masked(mask, fill=True), X, torch.arange(T).expand(2, T).contiguous())
    assert site.mask.kind == "custom"


def test_a_window_longer_than_the_traced_sizes_is_not_called_causal() -> None:
    def mask(m: Masked, x: Tensor, e: Any) -> Tensor:
        n = torch.arange(x.shape[1])
        return ~((n[None] <= n[:, None]) & (n[None] > n[:, None] - 40))

    found: list[Any] = []
    torch._dynamo.reset()
    backend = attnrewrite.Backend(inner="eager", strict=True, report=found.append)
    compiled = torch.compile(Masked(mask, fill=True), backend=backend, dynamic=True)
    with torch.no_grad():
        compiled(X)
        assert found[-1].sites[0].mask == Mask("window", offset=0, window=40, fill=-math.inf)
        long = torch.randn(2, 90, 16)
        assert torch.allclose(compiled(long), compiled._orig_mod(long), atol=1e-6)
    assert len(found) == 1
