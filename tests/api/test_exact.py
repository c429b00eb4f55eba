"""Exactness: compiled with the exact rewrite, outputs and all gradients are as good as ordinary PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, build, padded
from oracle import BAR, assert_as_good, error, exact, run
from torch import Tensor, nn

from attnrewrite import Backend
from attnrewrite.passes.report import Report, Site

CASES = [
    pytest.param(
        family,
        impl,
        pad,
        id=f"{family.name}-{impl}-{'padded' if pad else 'whole'}",
        marks=() if pad in (True, family.padded) and (impl == "eager" or family.name == "t5") else pytest.mark.slow,
    )
    for family in FAMILIES
    for impl in family.implementations
    for pad in ((False, True) if family.padded else (False,))
]


@pytest.mark.parametrize(("family", "impl", "pad"), CASES)
def test_outputs_and_gradients(family: Family, impl: str, pad: bool) -> None:
    model = build(family, impl)
    inputs = padded(family.inputs()) if pad else family.inputs()
    ordinary, true = run(model, inputs), exact(model, inputs)
    ours, sites = compiled_run(model, inputs)
    assert len(sites) == len(family.layers)
    assert all(s.status == "rewritten" or s.rejections[0].code in ("AR401", "AR404") for s in sites)
    if impl == "eager" and family.softcap is None:
        assert all(s.status == "rewritten" for s in sites)
    assert_as_good("output", ours[0], ordinary[0], true[0])
    unused = ours[1].keys() - true[1].keys()  # AOTAutograd gives parameters that take no part a gradient of zero
    assert ours[1].keys() >= true[1].keys()
    assert not any(bool(ours[1][name].any()) for name in unused)
    for name, gradient in true[1].items():
        assert_as_good(name, ours[1][name], ordinary[1][name], gradient)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.name, marks=() if f.name == "llama" else pytest.mark.slow) for f in FAMILIES],
)
def test_bfloat16(family: Family) -> None:
    """The bar on the root mean square over models: one ReLU that rounding flips decides a single gradient's error."""
    squares = {"output": [0.0, 0.0], "gradients": [0.0, 0.0]}
    for seed in range(3):
        torch.manual_seed(seed)
        model = family.build("eager").eval().to(torch.bfloat16)
        inputs = {k: narrow(v) for k, v in family.inputs().items()}
        ordinary, true = run(model, inputs), exact(model, inputs)
        ours, _ = compiled_run(model, inputs)
        for index, found in enumerate((ours, ordinary)):
            squares["output"][index] += error(found[0], true[0]) ** 2
            squares["gradients"][index] += error(flat(found[1], true[1]), flat(true[1], true[1])) ** 2
    for name, (mine, theirs) in squares.items():
        assert mine <= BAR**2 * theirs, f"{name}: {mine**0.5:.2e}, ordinary PyTorch {theirs**0.5:.2e}"


def compiled_run(model: nn.Module, inputs: dict[str, Any]) -> tuple[tuple[Tensor, dict[str, Tensor]], list[Site]]:
    torch._dynamo.reset()
    found: list[Report] = []
    compiled = copy.deepcopy(model)
    compiled.compile(backend=Backend(inner="aot_eager", strict=True, report=found.append))
    return run(compiled, inputs), [site for report in found for site in report.sites]


def narrow(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def flat(gradients: dict[str, Tensor], names: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in names])


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
