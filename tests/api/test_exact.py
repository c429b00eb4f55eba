"""Exactness: compiled with the exact rewrite, outputs and all gradients are as good as ordinary PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, Family, build, padded
from oracle import assert_as_good, exact, run

from attnrewrite import Backend
from attnrewrite.passes.report import Report

CASES = [
    pytest.param(family, impl, pad, dtype, id=f"{family.name}-{impl}-{'padded' if pad else 'whole'}-{name}")
    for family in FAMILIES
    for impl in family.implementations
    for pad in ((False, True) if family.padded else (False,))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    if not (dtype is torch.bfloat16 and (pad or impl == "sdpa"))
]


@pytest.mark.parametrize(("family", "impl", "pad", "dtype"), CASES)
def test_outputs_and_gradients(family: Family, impl: str, pad: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = build(family, impl).to(dtype)
    inputs = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in (padded(family.inputs()) if pad else family.inputs()).items()
    }
    ordinary, true = run(model, inputs), exact(model, inputs)
    found: list[Report] = []
    compiled = copy.deepcopy(model)
    compiled.compile(backend=Backend(inner="aot_eager", strict=True, report=found.append))
    ours = run(compiled, inputs)
    sites = [site for report in found for site in report.sites]
    assert len(sites) == len(family.layers)
    assert all(s.status == "rewritten" or s.rejections[0].code in ("AR401", "AR404") for s in sites)
    if impl == "eager" and family.softcap is None:
        assert all(s.status == "rewritten" for s in sites)
    assert_as_good("output", ours[0], ordinary[0], true[0])
    assert ours[1].keys() == true[1].keys()
    for name, gradient in true[1].items():
        assert_as_good(name, ours[1][name], ordinary[1][name], gradient)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_with_inductor(name: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    torch._dynamo.reset()
    model, inputs = build(family, "eager"), family.inputs()
    ordinary, true = run(model, inputs), exact(model, inputs)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="attnrewrite", options={"strict": True})
    ours = run(compiled, inputs)
    assert_as_good("output", ours[0], ordinary[0], true[0])
    for parameter, gradient in true[1].items():
        assert_as_good(parameter, ours[1][parameter], ordinary[1][parameter], gradient)
