"""What breaks matchers in the field: each case is found or refused with a code, and never computes something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import WIDTH, Attention, compiled_like_eager, rewritten
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.report import Report


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 1, 16), (1, 7, 16), (3, 1, 16), (16, 16, 16)], ids=str)
def test_equal_sizes_and_sizes_of_one(shape: tuple[int, int, int]) -> None:
    width = shape[-1]
    assert rewritten(compiled_like_eager(Attention(4 if width == 16 else 2, width), torch.randn(shape)))


def test_every_size_equal() -> None:
    """B = H = L = S = D = 4: nothing but the axes' names tells them apart."""
    assert rewritten(compiled_like_eager(Attention(4, 16), torch.randn(4, 4, 16)))


@pytest.mark.parametrize("shape", [(0, 5, WIDTH), (2, 0, WIDTH)], ids=str)
def test_empty_batches_and_sequences(shape: tuple[int, int, int]) -> None:
    assert len(compiled_like_eager(Attention(), torch.randn(shape))) == 1


@pytest.mark.parametrize("start", [1, 2, 5])
def test_dynamic_sizes_from_any_first_size(start: int) -> None:
    model, reports = Attention(), list[Report]()
    torch._dynamo.reset()
    backend = attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, length in ((start, start), (3, 5), (2, 7), (1, 1), (4, 4)):
        x = torch.randn(batch, length, WIDTH)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert all(site.status == "rewritten" for report in reports for site in report.sites)


class Filled(Attention):
    """Some rows see no key at all."""

    fill = float("-inf")

    def mask(self, scores: Tensor) -> Tensor:
        hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
        hidden[1] = True
        return scores.masked_fill(hidden, self.fill)


@pytest.mark.parametrize("fill", [float("-inf"), -1e9, torch.finfo(torch.float32).min], ids=str)
def test_rows_without_keys(fill: float) -> None:
    """NaN with -inf as fill, the mean of all values with a finite one; never the fused operator's zero."""
    model = Filled()
    model.fill = fill
    compiled_like_eager(model, torch.randn(2, 5, WIDTH))


class Returns(Attention):
    def forward(self, x: Tensor) -> Any:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = torch.softmax(scores, -1)
        out = self.o((weights @ v).transpose(-3, -2).flatten(-2))
        return out, weights, scores, k, v


def test_weights_scores_keys_and_values_are_returned_too() -> None:
    assert rewritten(compiled_like_eager(Returns(), torch.randn(2, 5, WIDTH)))


class Tied(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.k = self.q


def test_queries_and_keys_share_their_weights() -> None:
    assert rewritten(compiled_like_eager(Tied(), torch.randn(2, 5, WIDTH)))


def test_a_hook_on_a_projection_takes_part() -> None:
    model = Attention()
    model.q.register_forward_hook(lambda module, args, out: out * 1.5)
    (site,) = compiled_like_eager(model, torch.randn(2, 5, WIDTH))
    assert site.scale == pytest.approx(1.5 / 2)


class LowRank(nn.Module):
    """A frozen linear map and a small trained one beside it, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def test_adapters_around_the_projections() -> None:
    model = Attention()
    model.q, model.v = LowRank(model.q), LowRank(model.v)
    assert rewritten(compiled_like_eager(model, torch.randn(2, 5, WIDTH)))


@torch.library.custom_op("attnrewrite_tests::opaque_linear", mutates_args=())
def opaque_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@opaque_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-1])


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return opaque_linear(x.detach(), self.weight)


def test_projections_that_cannot_be_looked_into() -> None:
    model = Attention()
    model.q, model.k = Opaque(), Opaque()
    assert rewritten(compiled_like_eager(model, torch.randn(2, 5, WIDTH)))


def per_example(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.vmap(model)


def input_gradient(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.func.grad(lambda x: model(x).square().sum())


@pytest.mark.parametrize("transform", [per_example, input_gradient])
def test_transforms_of_torch_func_are_left_alone(transform: Callable[[nn.Module], Any]) -> None:
    """Traced once more, their wrapped values would become constants: the graph stays as it is."""
    function, x = transform(Attention()), torch.randn(3, 5, WIDTH)
    torch._dynamo.reset()
    with pytest.warns(attnrewrite.AttnRewriteWarning, match="AR107"):
        found = torch.compile(function, backend=attnrewrite.Backend(inner="aot_eager"))(x)
    assert torch.allclose(found, function(x), atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="AR107"):
        torch.compile(function, backend=attnrewrite.Backend(inner="aot_eager", strict=True))(x)


class Dropped(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = F.dropout(torch.softmax(q @ k.mT * 0.5, -1), 0.3, training=True)
        return self.o((weights @ v).transpose(-3, -2).flatten(-2))


def test_active_dropout_draws_the_same_random_numbers() -> None:
    (site,) = compiled_like_eager(Dropped(), torch.randn(2, 5, WIDTH))
    assert [r.code for r in site.rejections] == ["AR206"]


class Autocast(Attention):
    """The product in bfloat16, the softmax outside."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        with torch.autocast("cpu", torch.bfloat16):
            scores = q @ k.mT
        return self.o((torch.softmax(scores.float() * 0.5, -1) @ v).transpose(-3, -2).flatten(-2))


def test_an_attention_across_the_edge_of_autocast_is_left() -> None:
    (site,) = compiled_like_eager(Autocast(), torch.randn(2, 5, WIDTH))
    assert [r.code for r in site.rejections] == ["AR204"]


class WrittenThroughAView(Attention):
    """The diagonal of the scores is overwritten through a view."""

    def mask(self, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
        return scores


def test_scores_written_through_a_view() -> None:
    (site,) = compiled_like_eager(WrittenThroughAView(), torch.randn(2, 5, WIDTH))
    assert site.status == "rejected" and [r.code for r in site.rejections] == ["AR207"]


class StatementsInPlace(Attention):
    def mask(self, scores: Tensor) -> Tensor:
        scores.mul_(0.5)
        scores.add_(torch.full(scores.shape[-2:], -1e30).triu(1))
        return scores


def test_writes_as_statements_of_their_own() -> None:
    (site,) = compiled_like_eager(StatementsInPlace(), torch.randn(2, 5, WIDTH))
    assert (site.status, site.mask.kind, site.scale) == ("rewritten", "causal", 0.25)


class DataMask(Attention):
    def mask(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(scores < scores.mean(-1, keepdim=True), float("-inf"))


def test_a_mask_that_depends_on_the_scores() -> None:
    (site,) = compiled_like_eager(DataMask(), torch.randn(2, 5, WIDTH))
    assert site.mask.kind == "custom"


class Broken(Attention):
    """A graph break before or behind the softmax."""

    before = True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.mT * 0.5
        if self.before:
            torch._dynamo.graph_break()
        weights = torch.softmax(scores, -1)
        if not self.before:
            torch._dynamo.graph_break()
        return self.o((weights @ v).transpose(-3, -2).flatten(-2))


@pytest.mark.parametrize("before", [True, False])
def test_a_graph_break_inside_an_attention_is_named(before: bool) -> None:
    model, reports = Broken(), list[Report]()
    model.before = before
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=attnrewrite.Backend(inner="aot_eager", report=reports.append))
    x = torch.randn(2, 5, WIDTH)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    (row,) = [row for report in reports for row in report.rejections]
    assert row.code == "AR202" and "graph break" in row.detail and "test_hazards.py:" in row.source
