"""Attention in strips, through the operator of symmetric attention: equal to the dense form, whatever the strips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrewrite.kernels import strips
from attnrewrite.kernels.symmetric.op import symmetric_attention as in_strips
from attnrewrite.kernels.symmetric.reference import symmetric_attention as dense

CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def inputs(B, Hkv, G, L, D, Dv, seed, *, pair=True, bias=None, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    shapes = [(B, Hkv, L, D), (B, Hkv, L, Dv), (Hkv * G, D, D) if pair else None, bias]
    drawn = [None if s is None else torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
    return [None if x is None else x.to(dtype).requires_grad_() for x in drawn]


def gradients(attend, tensors, **options):
    out = attend(*tensors, enable_gqa=True, **options)
    leaves = [x for x in tensors if x is not None and x.requires_grad]
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equal_to_the_dense_form(data):
    draw = data.draw
    B, Hkv, L = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 11))
    pair = draw(st.booleans())
    G = draw(st.integers(1, 3)) if pair else 1
    causal = draw(st.booleans())
    options = {
        "is_causal": causal,
        "window": draw(st.none() | st.integers(1, 12)) if causal else None,
        "softcap": draw(st.sampled_from([None, 1.5])),
        "mask_self": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    bias = draw(st.sampled_from([None, (1, 1, L, L), (B, Hkv * G, L, L), (L,), (B, 1, 1, L)]))
    tensors = inputs(
        B, Hkv, G, L, draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(0, 99)), pair=pair, bias=bias
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "BUDGET", draw(st.sampled_from([1, 40, 1 << 22])))
        ours = gradients(in_strips, tensors, **options)
    for a, b in zip(ours, gradients(dense, tensors, **options), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_boolean_masks_and_rows_without_keys(monkeypatch):
    monkeypatch.setattr(strips, "BUDGET", 50)
    tensors = inputs(2, 2, 1, 9, 4, 3, 0)
    tensors[3] = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.5
    tensors[3][0, :, 4] = False
    ours, expected = gradients(in_strips, tensors), gradients(dense, tensors)
    assert torch.equal(ours[0][0, :, 4], torch.zeros(2, 3, dtype=torch.float64))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_gradients_against_differences(monkeypatch):
    monkeypatch.setattr(strips, "BUDGET", 30)
    tensors = inputs(1, 2, 2, 5, 3, 2, 0, bias=(1, 4, 5, 5))
    assert torch.autograd.gradcheck(lambda *x: in_strips(*x, enable_gqa=True, is_causal=True, softcap=2.0), tensors)


def test_dropout_keeps_the_mean():
    shared, value = torch.zeros(1, 1, 400, 4), torch.ones(1, 1, 400, 1)
    torch.manual_seed(0)
    out = in_strips(shared, value, dropout_p=0.25)
    assert abs(out.mean().item() - 1) < 0.01
    assert torch.equal(in_strips(shared, value, dropout_p=1.0), torch.zeros_like(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_ordinary_pytorch(assert_no_worse, dtype):
    """What one writes in 16 bit: products in 16 bit, softmax in float32."""
    tensors = inputs(2, 2, 2, 111, 32, 16, 0, dtype=dtype)[:3]
    exact = [x.detach().double().requires_grad_() for x in tensors]

    def ordinary(shared, value, pair, **_):
        keys, values = (x.repeat_interleave(2, 1) for x in (shared, value))
        weights = ((keys @ pair) @ keys.mT * 32**-0.5).float().softmax(-1)
        return weights.to(dtype) @ values

    names = ("output", "shared", "value", "pair")
    trios = (gradients(in_strips, tensors), gradients(ordinary, tensors), gradients(dense, exact))
    for name, ours, theirs, true in zip(names, *trios, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, true, name)
