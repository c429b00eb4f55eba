"""First reach: every attention of eight families, at both entries, with the facts that the configs state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, HEAD_DIM, HEADS, Family, build, padded

from attnrewrite.explanation import explain
from attnrewrite.passes.graph.capture import Capture, from_dynamo
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.report import Report

CASES = [
    pytest.param(
        family,
        impl,
        pad,
        entry,
        id=f"{family.name}-{impl}-{'padded' if pad else 'whole'}-{entry}",
        marks=() if impl == "eager" and (pad or not family.padded) == (entry == "export") else pytest.mark.slow,
    )
    for family in FAMILIES
    for impl in family.implementations
    for pad in ((False, True) if family.padded else (False,))
    for entry in ("dynamo", "export")
]


def dynamo_report(model: torch.nn.Module, inputs: dict[str, Any]) -> Report:
    report = Report()

    def collect(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        capture: Capture = from_dynamo(gm, example_inputs)
        report.extend(Pipeline().inspect(capture)[0])
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=collect)(**inputs)
    return report


@pytest.mark.parametrize(("family", "impl", "pad", "entry"), CASES)
def test_every_attention_is_found_with_its_facts(family: Family, impl: str, pad: bool, entry: str) -> None:
    model, inputs = build(family, impl), family.inputs()
    inputs = padded(inputs) if pad else inputs
    report = explain(model, **inputs) if entry == "export" else dynamo_report(model, inputs)
    sites = report.sites
    assert [s.layer for s in sites] == list(family.layers)
    assert all(s.certificate == "proved" for s in sites)
    assert all(".py:" in s.source for s in sites)
    assert {(s.heads, s.kv_heads, s.head_dim) for s in sites} == {(HEADS, family.kv_heads, HEAD_DIM)}
    assert all(s.scale == pytest.approx(family.scale) for s in sites)
    assert {s.softcap for s in sites} == {family.softcap}
    for site, kind, biased in zip(sites, family.masks, family.bias or (False,) * len(sites), strict=True):
        assert bool(site.bias) == biased
        assert site.mask.kind == _expected(kind, (pad and "decoder.block" not in site.layer) or _cross(site, pad))
        if kind == "window":
            assert site.mask.window == 8
        if kind in ("causal", "window"):
            assert site.mask.offset == 0


def _cross(site: Any, pad: bool) -> bool:
    return pad and "EncDec" in site.layer


def _expected(kind: str, pad: bool) -> str:
    if not pad:
        return kind
    return "padding" if kind == "none" else f"{kind}+padding"


def test_equal_layers_are_proved_once() -> None:
    pipeline = Pipeline()
    family = FAMILIES[0]
    torch._dynamo.reset()

    def collect(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        pipeline.inspect(from_dynamo(gm, example_inputs))
        return gm

    with torch.no_grad():
        torch.compile(build(family, "eager"), backend=collect)(**family.inputs())
    assert len(pipeline.prover.memo) == 1
