"""Drawings: what is in them, that equal layers share them, and that their cost does not grow with the graph."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from spellings import SPELLINGS, WIDTH, NanoGPT
from tiny import llama
from torch import Tensor, nn

import attnrewrite
from attnrewrite.explanation import capture_model, explain_capture
from attnrewrite.passes import extract
from attnrewrite.passes.report import Drawing, Report

IDS = torch.arange(8)[None]


def ops(drawing: Drawing) -> dict[str, str]:
    """Return role -> operator, of the last box of each role."""
    return {box.role: box.op for box in drawing.nodes if box.role}


def test_before_and_after_of_a_match() -> None:
    report = attnrewrite.explain(llama(attn_implementation="eager", num_hidden_layers=3), input_ids=IDS)
    assert {site.before for site in report.sites} | {site.after for site in report.sites} == set(report.drawings)
    assert len(report.drawings) == 2
    before, after = report.drawings[report.sites[0].before], report.drawings[report.sites[0].after]
    assert {"query", "key", "value", "mask", "scores", "probs", "output"} == set(ops(before))
    assert [(box.op, box.shape) for box in before.nodes if box.name == "query"] == [("input", [1, 4, 8, 8])]
    assert [box.op for box in after.nodes] == ["input"] * 3 + ["scaled_dot_product_attention"]
    assert [box.name for box in after.nodes][:3] == ["query", "key", "value"]
    names = {box.name for box in before.nodes}
    assert len(names) == len(before.nodes)
    assert names == {name for edge in before.edges for name in edge}
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (attnrewrite.SSAConfig(), {"q_gate", "v_gate", "q_gain", "v_gain", "projection"}),
        (attnrewrite.SelectiveConfig(), {"gamma"}),
    ],
)
def test_after_shows_the_variant_that_is_asked_for(config: Any, names: set[str]) -> None:
    model = llama(num_hidden_layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = explain_capture(capture_model(model, (), {"input_ids": IDS}), config)
    assert len({site.after for site in report.sites}) == 1
    after = report.drawings[report.sites[0].after]
    assert names <= {box.name for box in after.nodes if box.op == "input"}
    assert after.nodes[-1].role == "output"
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(("make", "kind", "heads"), SPELLINGS)
def test_every_spelling_is_drawn(make: type[nn.Module], kind: str, heads: int) -> None:
    report = attnrewrite.explain(make(), torch.randn(2, 13, WIDTH))
    (site,) = report.sites
    roles = [box.role for box in report.drawings[site.before].nodes]
    assert {"query", "key", "value", "output"} <= set(roles)
    assert bool(site.after) == (site.status == "matched" and not site.rejections)
    assert all(box.op for drawing in report.drawings.values() for box in drawing.nodes)


def test_reports_of_the_backend_are_drawn_alike() -> None:
    model, x, found = Deep(3).eval(), torch.randn(2, 13, WIDTH), list[Report]()
    torch._dynamo.reset()
    torch.compile(model, backend=attnrewrite.Backend(inner="eager", strict=True, report=found.append))(x)
    (ours,), theirs = found, attnrewrite.explain(model, x)
    assert [site.status for site in ours.sites] == ["rewritten"] * 3
    assert [(site.before, site.after) for site in ours.sites] == [(ours.sites[0].before, ours.sites[0].after)] * 3
    for which in ("before", "after"):
        a, b = (r.drawings[getattr(r.sites[0], which)] for r in (ours, theirs))
        assert [(box.op, box.role) for box in a.nodes] == [(box.op, box.role) for box in b.nodes]


def test_nothing_is_drawn_where_no_report_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnrewrite.passes.drawing._draw", lambda *_: pytest.fail("drawn"))
    torch._dynamo.reset()
    torch.compile(NanoGPT().eval(), backend=attnrewrite.Backend(inner="eager", strict=True))(torch.randn(2, 13, WIDTH))


class Refused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        long = x
        for _ in range(40):
            long = long * 1.5 + x
        return torch.softmax(torch.relu(long @ x.mT), -1) @ x


def test_a_refused_site_is_drawn_from_product_to_product() -> None:
    report = attnrewrite.explain(Refused(), torch.randn(1, 5, 4))
    (site,) = report.sites
    assert (site.status, site.rejections[0].code, site.after) == ("rejected", "AR203", "")
    drawn = report.drawings[site.before]
    assert [box.op for box in drawn.nodes if box.role] == ["matmul", "relu", "softmax", "matmul"]
    assert len(drawn.nodes) < 20


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([NanoGPT() for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_drawing_looks_at_its_own_site_only(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[int] = []
    whole = extract._span
    monkeypatch.setattr(extract, "_span", lambda nodes: spans.append(len(found := whole(nodes))) or found)
    x = torch.randn(2, 13, WIDTH)
    attnrewrite.explain(Deep(2).eval(), x)
    few = list(spans)
    spans.clear()
    report = attnrewrite.explain(Deep(8).eval(), x)
    assert max(spans) == max(few)
    assert len(spans) == 4 * len(few)
    assert len(report.drawings) == 2


def test_a_rewrite_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("attnrewrite.passes.rewriting.lower._trace", broken)
    (site,) = attnrewrite.explain(NanoGPT().eval(), torch.randn(2, 13, WIDTH)).sites
    assert (site.status, site.rejections[0].code) == ("rejected", "AR901")
    assert "no such operator" in site.rejections[0].detail
