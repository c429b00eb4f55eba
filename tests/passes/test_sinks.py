"""Sinks, one more logit per head that takes weight and gives no value; and what stays beside masks that have names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import HEADS, WIDTH, Attention
from families import FAMILIES, build, padded, text_inputs
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

import attnrewrite
from attnrewrite.observation import observe
from attnrewrite.passes.report import Report, Site
from attnrewrite.passes.rules import sdpa

LENGTH = 6


class WithSink(Attention):
    """GPT-OSS's form, with another column, another mask, or the column in front."""

    def __init__(self, column: Callable[[WithSink, Tensor], Tensor] | None = None, *, first: bool = False) -> None:
        super().__init__()
        self.sinks, self.column, self.first = nn.Parameter(torch.randn(HEADS)), column, first

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return q @ k.mT * 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = self.scores(q, k, x)
        column = self.sinks.reshape(1, -1, 1, 1) if self.column is None else self.column(self, x)
        both = [scores, column.expand(*scores.shape[:-1], 1)]
        combined = torch.cat(both[::-1] if self.first else both, dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        weights = torch.softmax(combined, dim=-1)
        weights = weights[..., 1:] if self.first else weights[..., :-1]
        return self.o((weights @ v).transpose(-3, -2).flatten(-2))


class Masked(WithSink):
    """Causal and padded, so that the first query of the first sequence sees nothing."""

    fill, added = float("-inf"), False

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        hidden = later | (x[..., 0] > 0)[:, None, None]
        scores = super().scores(q, k, x)
        if not self.added:
            return scores.masked_fill(hidden, self.fill)
        return scores + torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, self.fill)


COLUMNS: dict[str, Callable[[WithSink, Tensor], Tensor]] = {
    "computed": lambda m, x: (F.softplus(m.sinks) - 1)[:, None, None],
    "repeated": lambda m, x: m.sinks[None, :, None, None].repeat(x.shape[0], 1, x.shape[1], 1),
    "one for all": lambda m, x: m.sinks.sum(),
    "cast": lambda m, x: m.sinks[:, None, None].expand(HEADS, x.shape[1], 1).float().to(x.dtype),
    "folded and cast": lambda m, x: (
        m.sinks[:, None].expand(x.shape[0], HEADS, 1).flatten(0, 1).float().view(-1, HEADS, 1, 1)
    ),
    "zeros": lambda m, x: x.new_zeros(x.shape[0], HEADS, x.shape[1], 1),
}
REFUSED: dict[str, Callable[[WithSink, Tensor], Tensor]] = {
    "by query": lambda m, x: (m.sinks * x[..., :1]).mT[..., None],
    "by sequence": lambda m, x: (m.sinks * x[:, 0, :1])[..., None, None],
    "by place": lambda m, x: torch.arange(LENGTH).to(x)[:, None],
}


def compared(model: nn.Module, x: Tensor, rtol: float = 1e-11) -> Site:
    """Compile ``model`` and compare its output and all gradients, in float64; return its one site."""
    torch._dynamo.reset()
    model, x, reports = model.double(), x.double(), list[Report]()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append))
    for found, true in zip(results(compiled, twin, x), results(model, model, x), strict=True):
        assert torch.allclose(found, true, rtol=rtol, atol=1e-2 * rtol)
        assert torch.isfinite(found).all()
    (site,) = [site for report in reports for site in report.sites]
    return site


def results(function: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), [x, *model.parameters()], allow_unused=True)
    return [out, *(torch.zeros(()) if by is None else by for by in found)]


def hidden_first(batch: int = 2) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(batch, LENGTH, WIDTH)
    x[0, 0, 0] = 1.0
    return x


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_exact_rewrite_takes_sinks(first: bool, batch: int) -> None:
    site = compared(WithSink(first=first), torch.randn(batch, LENGTH, WIDTH))
    assert (site.status, site.certificate, site.sink, site.implementation) == ("rewritten", "proved", True, "reference")
    assert "sink" in site.spelling


@pytest.mark.parametrize("name", COLUMNS)
def test_sinks_of_one_number_per_head(name: str) -> None:
    rounded = 1e-6 if "cast" in name else 1e-11  # gradients pass through float32
    site = compared(WithSink(COLUMNS[name]), torch.randn(2, LENGTH, WIDTH), rounded)
    assert (site.status, site.certificate) == ("rewritten", "proved")


@pytest.mark.parametrize("name", REFUSED)
def test_other_sinks_stay(name: str) -> None:
    site = compared(WithSink(REFUSED[name]), torch.randn(2, LENGTH, WIDTH))
    assert (site.status, site.certificate, [r.code for r in site.rejections]) == ("matched", "proved", ["AR401"])
    assert site.rejections[0].detail.startswith("the sink may differ by query or by sequence")


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float64).min, -1e9])
@pytest.mark.parametrize("added", [False, True])
def test_rows_without_keys_give_zero(fill: float, added: bool) -> None:
    """The sink takes all weight, whatever the mask is made of."""
    model = Masked()
    model.fill, model.added = fill, added
    x = hidden_first()
    site = compared(model, x)
    assert (site.status, site.mask.kind, site.empty_row) == ("rewritten", "causal+padding", "zero")
    bias = model.o.bias.detach()
    assert torch.equal(model(x.double())[0, 0], bias)


class Grouped(WithSink):
    """Scores [B, Hkv, G, L, S], and sinks numbered by key-value heads first."""

    def table(self) -> Tensor:
        return self.sinks.view(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(self.q(x)).unflatten(1, (2, 2))
        k, v = (self.split(y(x))[:, :2, None] for y in (self.k, self.v))
        sinks = self.table()[None, :, :, None, None].expand(x.shape[0], -1, -1, x.shape[1], -1)
        weights = torch.softmax(torch.cat([q @ k.mT * 0.5, sinks], -1), -1)[..., :-1]
        return self.o((weights @ v).flatten(1, 2).transpose(-3, -2).flatten(-2))


class GroupsFirst(Grouped):
    """The other way round."""

    def table(self) -> Tensor:
        return self.sinks.view(2, 2).T


def test_the_order_of_heads() -> None:
    """Two layers that differ in nothing else are not taken for one another."""
    x = torch.randn(2, LENGTH, WIDTH)
    assert all(compared(model, x).status == "rewritten" for model in (Grouped(), GroupsFirst()))
    torch._dynamo.reset()
    both = nn.Sequential(Grouped(), GroupsFirst()).double()
    compiled = torch.compile(both, backend=attnrewrite.Backend(inner="eager", strict=True))
    assert torch.allclose(compiled(x.double()), both(x.double()), rtol=1e-12)


@pytest.mark.parametrize("column", [None, *REFUSED.values()])
def test_what_is_observed_has_its_sink(column: Callable[[WithSink, Tensor], Tensor] | None) -> None:
    """Also where no rewrite takes it."""
    model, x, found, true = Masked(column).double(), hidden_first().double(), list[Tensor](), list[Tensor]()
    model.o.register_forward_pre_hook(lambda _, inputs: true.append(inputs[0]))
    model(x)
    model.o._forward_pre_hooks.clear()
    observe(model, [x], lambda at: found.append(sdpa.exact(at.tensors).transpose(1, 2).flatten(2)))
    assert torch.allclose(found[0], true[0], rtol=1e-12)


def handed(monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the exact rewrite hands to the operator in each layer, on any device."""
    calls = list[dict[str, Any]]()

    def attention(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        calls.append(given)
        return sdpa_attention(q, k, v, **given)

    sdpa_attention = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", attention)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=attnrewrite.Backend(inner="eager", strict=True))
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs)[0], model(**inputs)[0], atol=1e-5)
    return calls


def test_masks_beside_sinks_go_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(family for family in FAMILIES if family.name == "gpt_oss")
    model, inputs = build(family, "eager"), family.inputs()
    plain = handed(monkeypatch, model, inputs)
    assert [(x["attn_mask"], x["is_causal"], x["window"]) for x in plain] == [(None, True, 8), (None, True, None)]
    assert [tuple(x["sinks"].shape) for x in plain] == [(HEADS,)] * 2
    for given, window in zip(handed(monkeypatch, model, padded(inputs)), (8, None), strict=True):
        assert (given["attn_mask"].dtype, tuple(given["attn_mask"].shape)) == (torch.bool, (2, 1, 1, 12))
        assert (given["is_causal"], given["window"]) == (True, window)


POSITIONAL = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=HEADS)),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=HEADS, max_seq_len=64)),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_alibi_stays_one_row_beside_a_causal_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    (given,) = handed(monkeypatch, POSITIONAL[name]().eval(), text_inputs())
    batch = 2 if name == "bloom" else 1
    assert (tuple(given["attn_mask"].shape), given["is_causal"]) == ((batch, HEADS, 1, 12), True)
