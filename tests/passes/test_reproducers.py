"""What users reported against pattern matchers for attention, as cases of ours; numbers are pytorch/pytorch issues."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.report import Report, Site

B, H, L, D = 2, 4, 6, 8
Attend = Callable[..., Tensor]


class Case(nn.Module):
    """Runs ``attend`` on three projections of its input."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))  # a bias of the keys has no gradient

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.attend(self.q(x), self.k(x), self.v(x), *rest)


def same_as_eager(attend: Attend, *inputs: Tensor, dynamic: bool | None = None, gradients: bool = True) -> list[Site]:
    """Compile, compare outputs and gradients with eager PyTorch, and return the sites."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    reports: list[Report] = []
    model = Case(attend).to(inputs[0].dtype)
    backend = attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    results: list[list[Tensor]] = []
    for function in (model, compiled):
        model.zero_grad(set_to_none=True)
        out = function(*inputs)
        if gradients:
            out.float().square().nansum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    bar = 1e-5 if inputs[0].dtype == torch.float32 else 2e-2
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert float((ours - theirs).nan_to_num().norm()) <= bar * (1 + float(theirs.nan_to_num().norm()))
    return [site for report in reports for site in report.sites]


def one(sites: list[Site]) -> str:
    (site,) = sites
    return site.status


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (B, H, L, D)), generator=torch.Generator().manual_seed(1)).to(dtype)


def test_195320_a_permuted_key_is_not_a_transposed_one() -> None:
    """With H equal to L the wrong permutation has the right shape."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.permute(0, 2, 3, 1) / math.sqrt(D), -1) @ v

    assert one(same_as_eager(attend, x(B, L, L, D))) in ("rewritten", "rejected")


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_174049_a_scale_that_is_not_the_default_is_kept(scale: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * scale + mask, -1) @ v

    sites = same_as_eager(attend, x(), x(L, L))
    assert (one(sites), sites[0].scale) == ("rewritten", pytest.approx(scale))


def test_100318_a_mask_that_hides_everything_gives_what_eager_gives() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).masked_fill(~mask, float("-inf")), -1) @ v

    same_as_eager(attend, x(), torch.zeros(L, L, dtype=torch.bool))


def test_195589_five_dimensions() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), -1) @ v

    assert one(same_as_eager(attend, x(2, 3, H, L, D))) == "rewritten"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
def test_100315_a_mask_of_another_dtype(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT + mask).to(q.dtype), -1) @ v

    assert one(same_as_eager(attend, x(), torch.ones(L, L).tril().to(dtype))) == "rewritten"


def test_191203_a_scale_that_is_a_tensor() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * scale, -1) @ v

    assert one(same_as_eager(attend, x(), torch.tensor(0.7))) == "rewritten"


@pytest.mark.parametrize("dynamic", [None, True])
def test_111190_a_scale_from_a_size(dynamic: bool | None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * (k.size(-1) ** -0.5), -1) @ v

    assert one(same_as_eager(attend, x(), dynamic=dynamic)) == "rewritten"


def test_195412_a_factor_beside_a_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (y.permute(0, 2, 1, 3) for y in (q, k, v))
        return torch.softmax(torch.mul(q @ k.transpose(-1, -2), 0.25) + mask, -1) @ v

    assert one(same_as_eager(attend, x(B, L, H, D), x(L, L))) == "rewritten"


def test_195784_half_precision_beside_a_mask_in_single() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT).float() + mask
        return torch.softmax(scores, -1).type_as(v) @ v

    assert one(same_as_eager(attend, x(dtype=torch.bfloat16), x(L, L))) == "rewritten"


def test_119911_a_clone_on_the_way() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).clone() / math.sqrt(q.size(-1))
        return F.dropout(torch.softmax(scores.contiguous(), -1), 0.0).clone() @ v.clone()

    assert one(same_as_eager(attend, x())) == "rewritten"


def test_126058_the_fused_operator_by_its_own_definition() -> None:
    """Both operands scaled by the fourth root, and rows without keys set to zero.

    Eager PyTorch's gradients are NaN here: the guard comes too late for them. Ours are not.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        root = D**-0.25
        scores = (q * root) @ (k.mT * root) + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        return torch.nan_to_num(torch.softmax(scores, -1)) @ v

    assert one(same_as_eager(attend, x(), torch.ones(L, L).tril(-1).bool(), gradients=False)) == "rewritten"


class NamedOut(nn.Module):
    """An argument of the name that many operators use for their result."""

    def forward(self, q: Tensor, k: Tensor, out: Tensor) -> Tensor:
        return torch.softmax(q.tanh() @ k.tanh().mT, -1) @ out


def test_137229_an_argument_named_out() -> None:
    torch._dynamo.reset()
    model, inputs = NamedOut(), (x(), x(), x())
    compiled = torch.compile(model, backend=attnrewrite.Backend(inner="aot_eager", strict=True))
    assert torch.allclose(compiled(*inputs), model(*inputs), atol=1e-6)


def test_162019_values_that_are_made_after_the_weights() -> None:
    """The order of the nodes is not that of the arguments."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, -1)
        late = torch.relu(v) + weights.sum(-1, keepdim=True)
        return weights @ late + weights.mean()

    assert one(same_as_eager(attend, x())) == "rewritten"


def test_inputs_and_integers_and_complex_numbers() -> None:
    """Queries that are inputs themselves; integer products; complex scores, which have no softmax."""
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).to(v.dtype) * 0.1, -1) @ v

    def complex_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).abs(), -1) @ v

    reports: list[Report] = []
    backend: Any = attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append)
    whole = torch.randint(0, 5, (B, H, L, D), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(
        torch.compile(attend, backend=backend)(whole, whole, x()), attend(whole, whole, x()), atol=1e-5
    )
    z = torch.complex(x(), x())
    ours = torch.compile(complex_scores, backend=backend)(z, z, x())
    assert torch.allclose(ours, complex_scores(z, z, x()), atol=1e-5)
    assert [site.status for report in reports for site in report.sites] == ["rejected", "rejected"]
