"""flex_attention: rewritten where it is fused attention, else named and left alone; the results are the model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import attnrewrite
from attnrewrite.explanation import explain
from attnrewrite.passes.report import Report

L, H, D = 24, 4, 8


class Flex(nn.Module):
    def __init__(
        self, score_mod: Callable[..., Tensor] | None = None, kv_heads: int = H, returns: bool = False
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, (H + 2 * kv_heads) * D).requires_grad_(False)
        self.sizes = [H * D, kv_heads * D, kv_heads * D]
        self.score_mod, self.options = score_mod, {"enable_gqa": kv_heads != H, "return_lse": returns}

    def forward(self, x: Tensor, mask: BlockMask | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in self.qkv(x).split(self.sizes, -1))
        out = flex_attention(q, k, v, score_mod=self.score_mod, block_mask=mask, **self.options)
        out = out[0] * out[1].unsqueeze(-1) if isinstance(out, tuple) else out
        return out.transpose(1, 2).flatten(2)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def lowered(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score + 0.1 * (j - i)


def blocks() -> BlockMask:
    return create_block_mask(causal, None, None, L, L, device="cpu")


def all_but_blocks() -> BlockMask:
    """Every pair is allowed, and yet the second block of keys is never visited."""
    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=L // 2)


CASES = [
    pytest.param(Flex, None, "", id="plain"),
    pytest.param(lambda: Flex(kv_heads=2), None, "", id="grouped"),
    pytest.param(lambda: Flex(lowered), None, "score_mod", id="score_mod"),
    pytest.param(Flex, blocks, "block mask", id="block_mask"),
    pytest.param(Flex, all_but_blocks, "block mask", id="blocks"),
    pytest.param(lambda: Flex(lowered), blocks, "score_mod) and hides keys", id="both"),
    pytest.param(lambda: Flex(returns=True), None, "more than the output", id="logsumexp"),
]


@pytest.mark.parametrize(("make", "mask", "refusal"), CASES)
def test_flex_attention_is_found_or_named(
    make: Callable[[], nn.Module], mask: Callable[[], BlockMask] | None, refusal: str
) -> None:
    torch._dynamo.reset()
    model, x = make().eval(), torch.randn(2, L, H * D)
    inputs = (x,) if mask is None else (x, mask())
    reports: list[Report] = []
    backend = attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ordinary run is not compiled, of which torch warns
        torch.testing.assert_close(torch.compile(model, backend=backend)(*inputs), model(*inputs))
    (site,) = [site for report in reports for site in report.sites]
    (seen,) = explain(model, *inputs).sites
    for row in (site, seen):
        assert (row.status == "rejected") == bool(refusal)
        if refusal:
            assert (row.rejections[0].code, refusal in row.rejections[0].detail) == ("AR203", True)
        else:
            assert row.certificate == "proved"


def test_a_block_mask_that_is_made_inside_is_named() -> None:
    class Inside(Flex):
        def forward(self, x: Tensor, mask: BlockMask | None = None) -> Tensor:
            return super().forward(x, blocks())

    torch._dynamo.reset()
    model, x = Inside().eval(), torch.randn(2, L, H * D)
    with pytest.warns(attnrewrite.AttnRewriteWarning, match="AR107.*\n.*block mask for flex_attention"):
        torch.compile(model, backend=attnrewrite.Backend(inner="eager"))(x)
