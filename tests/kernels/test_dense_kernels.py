"""Generated kernels of the dense family against the formula in float64, and against ordinary PyTorch."""

import pytest
import torch
from oracle import is_only_rounding

from attnrewrite.functional import attention, selective_attention, ssa_attention, symmetric_attention
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.diagnostics import AttnRewriteError
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.selective.reference import seen_by, selection_penalty
from attnrewrite.kernels.ssa.reference import scaled
from attnrewrite.kernels.visibility import accumulation_dtype, additive, repeat_kv, visible

CAUSAL = {"is_causal": True}


def formula(
    query, key, value, attn_mask=None, *, is_causal=False, window=None, softcap=None, tau=None, rho=None, gamma=None
):
    """Attention as an eager model writes it: products in the dtype of the inputs, softmax and votes in float32."""
    dtype, (L, S) = query.dtype, (query.shape[2], key.shape[2])
    wide = accumulation_dtype(dtype)
    query, value = (x if t is None else scaled(x, t) for x, t in ((query, tau), (value, rho)))
    seen = visible(L, S, is_causal=is_causal, window=window, attn_mask=attn_mask)
    logits = (query @ repeat_kv(key, query.shape[1]).mT).to(wide) * query.shape[-1] ** -0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    bias = additive(attn_mask)
    logits = logits if bias is None else logits + bias.to(wide)
    if gamma is not None:
        logits = logits - gamma * selection_penalty(logits[:, 0], seen_by(seen, 0))[0].unsqueeze(1)
    return masked_softmax(logits, seen).to(dtype) @ repeat_kv(value, query.shape[1])


def ours(query, key, value, attn_mask=None, *, tau=None, rho=None, gamma=None, **how):
    how |= {"enable_gqa": True}
    if tau is not None:
        return ssa_attention(query, key, value, tau, rho, attn_mask, **how)
    if gamma is not None:
        return selective_attention(query, key, value, attn_mask, gamma=gamma, **how)
    return attention(query, key, value, attn_mask, **how)


def outputs(function, tensors, upstream, how):
    """The output, and the gradients by everything that has one."""
    out = function(**tensors, **how)
    learn = [x for x in tensors.values() if x.requires_grad]
    return [out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), learn)]


def widened(tensors):
    return {
        n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for n, x in tensors.items()
    }


def compare(assert_no_worse, tensors, **how):
    exact = widened(tensors)
    upstream = torch.randn(formula(**exact, **how).shape, generator=torch.Generator().manual_seed(7))
    upstream = upstream.to(tensors["query"].dtype)
    true = outputs(formula, exact, upstream, how)
    ordinary = outputs(formula, tensors, upstream, how)
    with kernels("triton"):
        found = outputs(ours, tensors, upstream, how)
    names = ["out", *(n for n, x in tensors.items() if x.requires_grad)]
    for name, a, b, c in zip(names, found, ordinary, true, strict=True):
        assert a.dtype == b.dtype
        if is_only_rounding(c):  # of products of size 1: ordinary PyTorch may be exact here by luck
            assert (a - c).abs().max() < 32 * torch.finfo(a.dtype).eps, name
        elif c.dim():
            assert_no_worse(a, b, c, name, largest=False)
        else:  # one number: a sum over all pairs, of which the rounding errors may cancel in one of the two
            dtype = tensors["query"].dtype
            least = (32 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
            assert (a - c).abs() <= max(2 * (b - c).abs(), least * max(1.0, float(c.abs()))), name


def drawn(L=63, S=None, H=2, Hkv=2, D=16, Dv=16, B=1, dtype=torch.float32, seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = {"query": (B, H, L, D), "key": (B, Hkv, S or L, D), "value": (B, Hkv, S or L, Dv)}
    return {n: torch.randn(shape, generator=source).to(dtype).requires_grad_() for n, shape in shapes.items()}


def temperatures(tensors, seed=1):
    source = torch.Generator().manual_seed(seed)
    sizes = {"tau": tensors["query"].shape[:3], "rho": tensors["value"].shape[:3]}
    return {n: (torch.rand(size, generator=source) + 0.5).requires_grad_() for n, size in sizes.items()}


@pytest.fixture(autouse=True)
def poisoned():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("L", [1, 63, 111, 130])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sizes(assert_no_worse, L, is_causal):
    compare(assert_no_worse, drawn(L), is_causal=is_causal)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"H": 4, "Hkv": 2, "D": 24, "Dv": 40}, CAUSAL),
        ({"H": 4, "Hkv": 1, "B": 2}, {}),
        ({"L": 130}, {**CAUSAL, "window": 50}),
        ({"L": 70}, {**CAUSAL, "window": 1}),
        ({}, {**CAUSAL, "softcap": 2.0}),
        ({"L": 20, "S": 90}, {}),
        ({"L": 90, "S": 20}, CAUSAL),
        ({"D": 1, "Dv": 3}, CAUSAL),
        ({"L": 40, "D": 256, "Dv": 129}, CAUSAL),
        ({"dtype": torch.float16}, CAUSAL),
        ({"dtype": torch.bfloat16, "H": 4}, CAUSAL),
    ],
    ids=str,
)
def test_forms(assert_no_worse, shape, how):
    compare(assert_no_worse, drawn(**shape), **how)


@pytest.mark.parametrize("kind", ["keys", "pairs", "bias", "shared bias"])
@pytest.mark.parametrize("gamma", [None, 0.7])
def test_masks(assert_no_worse, kind, gamma):
    tensors, source = drawn(70, B=2), torch.Generator().manual_seed(2)
    shape = {"keys": (2, 1, 1, 70), "pairs": (1, 1, 70, 70), "bias": (2, 2, 70, 70), "shared bias": (1, 1, 70, 70)}[
        kind
    ]
    if "bias" in kind:
        mask = torch.randn(shape, generator=source).requires_grad_(gamma is None)
    else:
        mask = torch.rand(shape, generator=source) > 0.3
    more = {} if gamma is None else {"gamma": torch.tensor(gamma, requires_grad=True)}
    compare(assert_no_worse, {**tensors, "attn_mask": mask, **more}, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [CAUSAL, {"softcap": 3.0}], ids=str)
def test_temperatures(assert_no_worse, dtype, how):
    tensors = drawn(70, H=4, Hkv=2, Dv=24, dtype=dtype)
    compare(assert_no_worse, {**tensors, **temperatures(tensors)}, **how)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"L": 1}, {}),
        ({"L": 111, "H": 4, "Hkv": 2, "Dv": 24}, {}),
        ({"L": 130, "B": 2}, {"window": 40}),
        ({}, {"softcap": 2.0}),
        ({"dtype": torch.float16}, {}),
        ({"dtype": torch.bfloat16}, {}),
    ],
    ids=str,
)
def test_votes(assert_no_worse, shape, how):
    gamma = torch.tensor(0.7, requires_grad=True)
    compare(assert_no_worse, {**drawn(**shape), "gamma": gamma}, is_causal=True, **how)


@pytest.mark.parametrize("L", [63, 130])
def test_few_votes_that_reach_far(assert_no_worse, sparse_votes, L):
    """With independent queries and keys the far keys are dead, and a wrong vote there could not be seen."""
    query, key, value = sparse_votes(1, 2, 2, L, 16, dtype=torch.float32)
    gamma = torch.tensor(1.0, requires_grad=True)
    compare(assert_no_worse, {"query": query, "key": key, "value": value, "gamma": gamma}, is_causal=True)


@pytest.mark.parametrize("Hkv", [4, 2])
def test_formula_fixture(assert_no_worse, formulas, Hkv):
    given = formulas(a=0.5, Hkv=Hkv)
    tensors = {n: getattr(given, n).detach().float().requires_grad_() for n in ("query", "key", "value")}
    compare(assert_no_worse, {**tensors, "gamma": torch.tensor(1.0, requires_grad=True)}, is_causal=True)


def test_without_votes_selective_attention_is_plain_attention():
    tensors = drawn(70)
    with kernels("triton"):
        plain = attention(**tensors, is_causal=True)
        assert torch.equal(selective_attention(**tensors, gamma=0.0)[:, :, :3], plain[:, :, :3])
        assert (selective_attention(**tensors, gamma=0.0) - plain).abs().max() < 1e-6


def test_no_key_sees_what_comes_later():
    tensors = {n: x.detach() for n, x in drawn(70).items()}
    later = {n: torch.cat((x[:, :, :40], torch.full_like(x[:, :, 40:], 9.0)), 2) for n, x in tensors.items()}
    with kernels("triton"):
        for function in (attention, selective_attention):
            first, second = function(**tensors, is_causal=True), function(**later, is_causal=True)
            assert torch.equal(first[:, :, :40], second[:, :, :40])


def test_any_strides_and_the_same_bits_twice():
    tensors = drawn(70, H=4, Hkv=2)
    strided = {n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n, x in tensors.items()}
    inner = {n: x.detach().mT.contiguous().mT.requires_grad_() for n, x in tensors.items()}
    upstream = torch.randn(1, 4, 70, 16)
    how = {**CAUSAL, "gamma": torch.tensor(0.5)}
    with kernels("triton"):
        first, *others = (outputs(ours, given, upstream, how) for given in (tensors, tensors, strided, inner))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_rows_without_keys_give_0_and_nan_stays_nan():
    tensors = drawn(70)
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool)
    mask[:, :, 5] = False
    with kernels("triton"):
        out, *gradients = outputs(ours, {**tensors, "attn_mask": mask}, torch.ones(1, 2, 70, 16), {})
        assert (out[:, :, 5] == 0).all()
        assert all(x.isfinite().all() for x in gradients)
        broken = {n: x.detach().clone() for n, x in tensors.items()}
        broken["query"][0, 0, 7, 3] = float("nan")
        assert attention(**broken, is_causal=True)[0, 0, 7].isnan().all()
        assert selective_attention(**broken)[0, 1, 9:].isnan().any()


def test_no_rows_and_no_batch():
    with kernels("triton"):
        for B, L in ((0, 5), (2, 0)):
            tensors = {n: x.detach()[:B, :, :L] for n, x in drawn(5, B=2).items()}
            assert attention(**tensors, is_causal=True).shape == (B, 2, L, 16)
            assert selective_attention(**tensors).shape == (B, 2, L, 16)


def test_dropout_drops_the_same_weights_backwards():
    L = 70
    tensors = {n: x.detach() for n, x in drawn(L).items()}
    weights = []
    with kernels("triton"):
        for value in (torch.eye(L).expand(1, 2, L, L), tensors["value"].clone().requires_grad_()):
            torch.manual_seed(3)
            weights.append(attention(tensors["query"], tensors["key"], value, dropout_p=0.25, is_causal=True))
        upstream = torch.randn(1, 2, L, 16)
        (gradient,) = torch.autograd.grad((weights[1] * upstream).sum(), value)
    full = formula(tensors["query"], tensors["key"], torch.eye(L).expand(1, 2, L, L), is_causal=True)
    kept = weights[0] != 0
    assert 0.7 < kept[full > 0].float().mean() < 0.8
    assert torch.allclose(weights[0], torch.where(kept, full / 0.75, 0.0), atol=1e-6)
    assert torch.allclose(weights[1], weights[0] @ tensors["value"], atol=1e-5)
    assert torch.allclose(gradient, weights[0].mT @ upstream, atol=1e-5)


def test_gradients_through_dropout_are_those_of_the_kept_weights():
    L = 40
    tensors = drawn(L)
    upstream = torch.randn(1, 2, L, 16)
    with kernels("triton"):
        torch.manual_seed(3)
        eye = torch.eye(L).expand(1, 2, L, L)
        kept = attention(tensors["query"], tensors["key"], eye, dropout_p=0.25) != 0
        torch.manual_seed(3)
        found = outputs(attention, tensors, upstream, {"dropout_p": 0.25})

    def masked(query, key, value):
        weights = torch.softmax(query @ key.mT / 4, -1)
        return (weights * kept / 0.75) @ value

    for a, b in zip(found, outputs(masked, tensors, upstream, {}), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("pairwise", [False, True])
def test_symmetric_attention(assert_no_worse, pairwise):
    tensors = drawn(70)
    pair = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(1, 2, 70, 16)
    given = {"shared": tensors["key"], "value": tensors["value"], **({"pair": pair} if pairwise else {})}
    with kernels("reference"):
        ordinary = outputs(symmetric_attention, given, upstream, CAUSAL)
        exact = outputs(symmetric_attention, widened(given), upstream, CAUSAL)
    with kernels("triton"):
        found = outputs(symmetric_attention, given, upstream, CAUSAL)
    for a, b, c in zip(found, ordinary, exact, strict=True):
        assert_no_worse(a, b, c, largest=False)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [(drawn(4, dtype=torch.float64), "float64"), (drawn(4, D=300, Dv=16), "300 features")],
    ids=["float64", "wide heads"],
)
def test_what_has_no_kernel(tensors, text):
    assert attention(**tensors).shape == (1, 2, 4, 16)  # the reference, by itself
    with kernels("triton"), pytest.raises(AttnRewriteError, match=text) as caught:
        attention(**tensors)
    assert caught.value.code == "AR403"


def test_without_a_gpu_or_the_interpreter_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernels("triton"), pytest.raises(AttnRewriteError, match="no GPU") as caught:
        attention(**drawn(4))
    assert caught.value.code == "AR403"
