"""What is not attention, and what must not be touched: each with its code and place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spellings import WIDTH, NanoGPT
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.report import Report


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def scores(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT / WIDTH**0.5


class Router(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x), -1)
        return weights * x


class Pooling(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x).mean(-1, keepdim=True), 1)
        return (weights * x).sum(1)


class Classifier(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x).mean(1), -1)


class ScoresOnly(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x), -1)


class WrongAxis(Base):
    """The softmax runs over queries, the product with values over keys."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x), 1) @ self.v(x)


class HeadMask(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.softmax(self.scores(x), -1) * x[:, None, :, 0]) @ self.v(x)


class Gated(Base):
    """Scores multiplied by a value per key."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x) * x[:, None, :, 0], -1) @ self.v(x)


class Relu(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(torch.relu(self.scores(x)), -1) @ self.v(x)


class TalkingHeads(Base):
    """Heads are mixed before the softmax, or behind it."""

    how, behind = "linear", False

    def __init__(self) -> None:
        super().__init__()
        self.talk, self.point = nn.Linear(4, 4, bias=False), nn.Conv2d(4, 4, 1)

    def mixed(self, scores: Tensor) -> Tensor:
        if self.how == "linear":
            return self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.how == "einsum":
            return torch.einsum("bhij,gh->bgij", scores, self.talk.weight)
        if self.how == "matmul":
            return (self.talk.weight @ scores.flatten(2)).unflatten(2, scores.shape[2:])
        return self.point(scores)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (4, -1)).transpose(1, 2) for y in (self.q, self.k, self.v))
        scores = q @ k.mT
        weights = torch.softmax(scores if self.behind else self.mixed(scores), -1)
        return ((self.mixed(weights) if self.behind else weights) @ v).transpose(1, 2).flatten(2)


class TalkingWeights(Base):
    """Heads are mixed after the softmax, by a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (4, -1)).transpose(1, 2) for y in (self.q, self.k, self.v))
        return (self.talk(torch.softmax(q @ k.mT, -1)) @ v).transpose(1, 2).flatten(2)


class Chunked(Base):
    """Scores of two chunks are written into one new tensor."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        scores = x.new_zeros(*x.shape[:2], x.shape[1])
        scores[:, :6] = q[:, :6] @ k.mT
        scores[:, 6:] = q[:, 6:] @ k.mT
        return torch.softmax(scores, -1) @ self.v(x)


class Diagonals(Base):
    """Row i of the scores begins i places further left, so that a column is a distance."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        skewed = F.pad(self.scores(x), (0, 0, 0, 1)).view(-1, length, length + 1)[..., :length]
        return torch.softmax(skewed, -1) @ self.v(x)


class Assignment(Base):
    """Keys are shared out to queries, and every query takes the mean of its own, as slots do."""

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.scores(x), -2)
        return (shares / (shares.sum(-1, keepdim=True) + 1e-6)) @ self.v(x)


class Straddling(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = self.scores(x)
        return torch.softmax(scores.float(), -1) @ self.v(x)


class NoGradScores(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weights = torch.softmax(self.scores(x), -1)
        return weights @ self.v(x)


class SoftmaxInFullPrecision(Base):
    """Autocast is off around the softmax alone, within a region of no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scores = self.scores(x)
            with torch.autocast("cpu", enabled=False):
                weights = torch.softmax(scores.float(), -1)
            return weights @ self.v(x)


class WholeInRegions(Base):
    """Everything lies in one region, beside other regions, with a constant of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = x + self.q(x)
        with torch.no_grad():
            y = x + torch.arange(WIDTH) / WIDTH
            with torch.autocast("cpu", enabled=False):
                out, twice = torch.softmax(self.scores(y), -1) @ self.v(y), y * 2
        return out + twice + x


class WrittenLater(Base):
    """The queries are overwritten between their use and the attention's output."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        weights = torch.softmax(q @ self.k(x).mT / WIDTH**0.5, -1)
        q.mul_(2)
        return weights @ self.v(x) + q


X = torch.randn(2, 13, WIDTH)


def compiled_report(model: nn.Module, x: Tensor = X) -> Report:
    found: list[Report] = []
    torch._dynamo.reset()
    model.compile(backend=attnrewrite.Backend(inner="eager", strict=True, report=found.append))
    expected = type(model).forward(model, x)
    assert torch.allclose(model(x), expected, atol=1e-6)
    return found[0]


class TopExperts(Base):
    """A router as in mixtures of experts."""

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = torch.softmax(self.q(x), -1).topk(2)
        return weights.sum(-1) + experts.sum(-1)


class DynamicConvolution(Base):
    """A kernel per position, from a linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x), -1) @ self.k(x).unsqueeze(-1).expand(-1, -1, -1, WIDTH).flatten(1, 2)[:, :WIDTH]


class LinearAttention(Base):
    """Keys are normalised by themselves; no query-key scores exist."""

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) @ (torch.softmax(self.k(x), 1).mT @ self.v(x))


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (Router, "gate or a pooling"),
        (Pooling, "gate or a pooling"),
        (Classifier, "classifier"),
        (ScoresOnly, "never meet values"),
        (TopExperts, "router"),
        (DynamicConvolution, "dynamic convolution"),
        (LinearAttention, "linear attention"),
    ],
)
def test_other_softmaxes_are_reported_as_no_attention(cls: type[nn.Module], kind: str) -> None:
    report = attnrewrite.explain(cls(), X)
    assert report.sites == []
    (row,) = report.rejections
    assert row.code == "AR202"
    assert kind in row.detail
    assert "test_refusals.py:" in row.source


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WrongAxis, "over another axis than the product with the values"),
        (Assignment, "over another axis than the product with the values"),
        (Chunked, "stored by chunks"),
        (Diagonals, "stored by diagonals"),
    ],
)
def test_what_is_stored_or_summed_otherwise_is_named(cls: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model = cls()
    for site in (*attnrewrite.explain(model, X).sites, *compiled_report(model).sites):
        (row,) = site.rejections
        assert row.code == "AR203" and reason in row.detail and row.nearest and "test_refusals.py:" in row.source


@pytest.mark.parametrize("how", ["linear", "einsum", "matmul", "convolution"])
@pytest.mark.parametrize("behind", [False, True])
def test_mixed_heads_are_named(how: str, behind: bool) -> None:
    torch.manual_seed(0)
    model = TalkingHeads()
    model.how, model.behind = how, behind
    place = "the softmax and the product with the values" if behind else "the query-key product and the softmax"
    for site in (*attnrewrite.explain(model, X).sites, *compiled_report(model).sites):
        (row,) = site.rejections
        assert (row.code, row.detail) == ("AR203", f"heads are mixed between {place}")
        assert row.nearest.startswith("heads that attend by themselves") and "test_refusals.py:" in row.source


@pytest.mark.parametrize("cls", [Straddling, NoGradScores, SoftmaxInFullPrecision, WholeInRegions])
def test_edges_of_regions_are_seen_alike_at_both_entries(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = cls()
    (ours,), (theirs,) = attnrewrite.explain(model, X).sites, compiled_report(model).sites
    assert (ours.rejections, ours.source) == (theirs.rejections, theirs.source)
    assert [r.code for r in ours.rejections] == ([] if cls is WholeInRegions else ["AR204"])


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (HeadMask, "AR203"),
        (WrongAxis, "AR203"),
        (TalkingHeads, "AR203"),
        (TalkingWeights, "AR203"),
        (Chunked, "AR203"),
        (Gated, "AR203"),
        (Relu, "AR203"),
        (Straddling, "AR204"),
        (NoGradScores, "AR204"),
        (WrittenLater, "AR207"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_still_runs(cls: type[nn.Module], code: str) -> None:
    torch.manual_seed(0)
    (site,) = compiled_report(cls()).sites
    assert (site.status, site.rejections[0].code) == ("rejected", code)
    assert "test_refusals.py:" in site.rejections[0].source


def test_active_dropout_is_refused_and_inactive_is_not() -> None:
    torch.manual_seed(0)
    model = NanoGPT(dropout=0.5)
    found: list[Report] = []
    torch._dynamo.reset()
    model.compile(backend=attnrewrite.Backend(inner="eager", strict=True, report=found.append))
    model(X)
    model.eval()(X)
    assert [r.sites[0].status for r in found] == ["rejected", "rewritten"]
    assert found[0].sites[0].rejections[0].code == "AR206"


def test_soft_cap_is_recognised_and_left() -> None:
    class Capped(Base):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(30 * torch.tanh(self.scores(x) / 30), -1) @ self.v(x)

    (site,) = compiled_report(Capped()).sites
    assert (site.status, site.softcap, site.rejections[0].code) == ("matched", 30.0, "AR401")
