"""torch's encoder fast path, one opaque operator in eval mode, is looked into."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled import HEADS, WIDTH
from oracle import assert_as_good
from torch import nn

import attnrewrite
from attnrewrite.passes.report import Report


@pytest.mark.parametrize("form", ["fast path", "padding"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_encoder_fast_path_is_looked_into(form: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=norm_first).eval()
    x, padding = torch.randn(2, 6, WIDTH), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    mask = padding if form == "padding" else None
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append))
    with torch.no_grad():
        found, ordinary = compiled(x, src_key_padding_mask=mask), layer(x, src_key_padding_mask=mask)
        true = copy.deepcopy(layer).double()(x.double(), src_key_padding_mask=mask)
    (site,) = [site for report in reports for site in report.sites]
    assert (site.status, site.heads) == ("rewritten", HEADS)
    assert_as_good("output", found, ordinary, true)


@pytest.mark.parametrize(
    "masks", [(), ("attn_mask",), ("key_padding_mask",), ("attn_mask", "key_padding_mask")], ids=str
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_in_eval_mode(masks: tuple[str, ...], need_weights: bool) -> None:
    """Without gradients this is one opaque operator, with masks or without."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x, padding = torch.randn(2, 6, WIDTH), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    held = {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "key_padding_mask": padding}
    keywords = {"need_weights": need_weights, **{name: held[name] for name in masks}}
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append))
    with torch.no_grad():
        found, ordinary = compiled(x, x, x, **keywords), module(x, x, x, **keywords)
    (site,) = [site for report in reports for site in report.sites]
    assert site.status == "rewritten" or site.rejections[0].code == "AR404"
    for a, b in zip(found, ordinary, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)
