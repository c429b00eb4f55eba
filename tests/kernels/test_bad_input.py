"""What every variant does with inputs at the edge, and with those that do not fit."""

import pytest
import torch

from attnrewrite import functional
from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.variants import VariantConfig, list_variants

VARIANTS = ("selective", "ssa", "symmetric", "routing", "sea")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(N=6, H=4, Hkv=2, D=4, dtype=torch.float64):
    return tuple(drawn(2, h, N, D, seed=n).to(dtype) for n, h in enumerate((H, Hkv, Hkv)))


def attend(variant, query, key, value, **options):
    """Causal attention by a variant, with what it needs beside the three, such that it is near the plain one."""
    B, H, L, _ = query.shape
    Hkv, given = key.shape[1], {"is_causal": True, "enable_gqa": True, **options}
    if variant == "ssa":
        return functional.ssa_attention(
            query, key, value, query.new_ones(B, H, L), key.new_ones(key.shape[:3]), **given
        )
    if variant == "symmetric":
        return functional.symmetric_attention(key, value, **given)
    if variant == "routing":
        return functional.routing_attention(query, key, value, drawn(Hkv, 1, query.shape[3]).to(query.dtype), **given)
    if variant == "sea":
        estimated = query.new_zeros(B, H, L, 4)
        return functional.sea_attention(query, key, value, estimated, **{"budget": 64, **given})
    return functional.selective_attention(query, key, value, **given)


def plain(variant, query, key, value):
    if variant == "symmetric":
        query = key
    return functional.attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_that_do_not_fit(variant):
    query, key, value = tensors()
    shared = variant == "symmetric"
    wrong = [
        (query, key, value[:, :, :5]),
        (query, key[0], value[0]) if shared else (query, key[..., :3], value),
        (query, key, value[:1]),
        (query, key.long(), value.long()) if shared else (query.long(), key.long(), value.long()),
    ]
    for given in wrong:
        with pytest.raises(LoweringError) as failure:
            attend(variant, *given)
        assert failure.value.code == "AR402"


@pytest.mark.parametrize("variant", [x for x in VARIANTS if x != "symmetric"])
def test_head_counts_that_are_not_divisible(variant):
    query, key, value = tensors(Hkv=3)
    with pytest.raises(LoweringError) as failure:
        attend(variant, query, key, value)
    assert failure.value.code == "AR402"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_that_overflow_half_precision(variant):
    """Logits of more than 65504 are sums in single precision, and their softmax is that of single precision."""
    query, key, value = (200 * x.clamp(-1, 1).half() for x in tensors())
    found = attend(variant, query, key, value)
    wide = attend(variant, query.float(), key.float(), value.float())
    assert float(query.float().square().sum(-1).max()) / 2 > 65504
    assert found.dtype == torch.float16 and found.isfinite().all()
    torch.testing.assert_close(found.float(), wide, rtol=2e-3, atol=0.2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_padding_alone_give_0_and_finite_gradients(variant):
    given = tuple(x.requires_grad_() for x in tensors())
    mask = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 6)
    found = attend(variant, *given, attn_mask=mask)
    assert not found[1].any() and found[0].any()
    used = [
        x
        for x, grad in zip(given, torch.autograd.grad(found.sum(), given, allow_unused=True), strict=True)
        if grad is not None
    ]
    for gradient in torch.autograd.grad(attend(variant, *given, attn_mask=mask).sum(), used):
        assert gradient.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_sees_itself(variant):
    query, key, value = tensors(N=1)
    found = attend(variant, query, key, value)
    torch.testing.assert_close(found, value.repeat_interleave(found.shape[1] // 2, 1))


@pytest.mark.parametrize(("variant", "budget"), [("routing", {"window_size": 99}), ("sea", {"budget": 99})])
def test_more_keys_than_there_are(variant, budget):
    given = tensors()
    torch.testing.assert_close(attend(variant, *given, **budget), plain(variant, *given))


@pytest.mark.parametrize(("variant", "budget"), [("routing", {"window_size": 0}), ("sea", {"budget": 0})])
def test_no_keys_at_all(variant, budget):
    with pytest.raises(LoweringError) as failure:
        attend(variant, *tensors(), **budget)
    assert failure.value.code == "AR402"


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_is_not_hidden(variant):
    """It reaches the last row, which sees it, and not the other sequence."""
    for which in range(3):
        given = [x.clone() for x in tensors()]
        given[which][0, :, 5] = float("nan")
        found = attend(variant, *given)
        if variant == "symmetric" and which == 0:
            continue  # there is no query
        assert found[0, :, 5].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_strides_do_not_matter(variant):
    given = tensors()
    expected = attend(variant, *given)
    torch.testing.assert_close(attend(variant, *(x.mT.contiguous().mT for x in given)), expected)
    flat = [x[..., :1].expand_as(x) for x in given]
    torch.testing.assert_close(attend(variant, *flat), attend(variant, *(x.contiguous() for x in flat)))


@pytest.mark.parametrize("name", [info.name for info in list_variants()])
def test_configs_with_unknown_keys(name):
    with pytest.raises(Exception, match=r"AR302(.|\n)*windowsize"):
        VariantConfig.from_dict({"variant": name, "windowsize": 3})
