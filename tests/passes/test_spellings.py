"""The same attention, written in many ways: found, named, rewritten, and equal in values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_as_good, exact, run
from spellings import HEADS, SPELLINGS, WIDTH, MultiheadAttention
from torch import nn

import attnrewrite
from attnrewrite.passes.report import Report

MODULES = [pytest.param(cls, kind, heads, id=cls.__name__) for cls, kind, heads in SPELLINGS] + [
    pytest.param(lambda w=w, m=m: MultiheadAttention(w, m), m, HEADS, id=f"MultiheadAttention-{w}-{m}")
    for w in (True, False)
    for m in ("none", "causal", "padding")
]


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("make", "kind", "heads"), MODULES)
def test_spelling_is_found_and_exact(make: type[nn.Module], kind: str, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make().to(dtype)
    inputs = torch.randn(2, 13, WIDTH).to(dtype)
    reports: list[Report] = []
    compiled = copy.deepcopy(model)
    compiled.compile(backend=attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append))
    positional = _Positional(model), _Positional(compiled)
    ordinary, ours, true = (
        run(positional[0], {"x": inputs}),
        run(positional[1], {"x": inputs}),
        exact(positional[0], {"x": inputs}),
    )
    (site,) = [site for report in reports for site in report.sites]
    assert (site.mask.kind, site.heads, site.certificate) == (kind, heads, "proved")
    assert site.status == "rewritten" or site.rejections[0].code == "AR404"
    assert_as_good("output", ours[0], ordinary[0], true[0])
    for name, gradient in true[1].items():
        assert_as_good(name, ours[1][name], ordinary[1][name], gradient)


class _Positional(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out
