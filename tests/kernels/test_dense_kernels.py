"""Generated kernels of the dense family against the formula in float64, and against ordinary PyTorch."""

import pytest
import torch
from dense_support import CAUSAL, DEVICE, compare, drawn, formula, normal, ours, outputs, temperatures, widened

from attnrewrite.functional import attention, selective_attention, symmetric_attention
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.diagnostics import AttnRewriteError

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("on_the_device", "poisoned")]


@pytest.mark.parametrize("L", [1, 63, 111, 130])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sizes(L, is_causal):
    compare(drawn(L), is_causal=is_causal)


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
def test_forms(shape, how):
    compare(drawn(**shape), **how)


@pytest.mark.parametrize("kind", ["keys", "pairs", "bias", "shared bias"])
@pytest.mark.parametrize("gamma", [None, 0.7])
def test_masks(kind, gamma):
    tensors = drawn(70, B=2)
    shape = {"keys": (2, 1, 1, 70), "pairs": (1, 1, 70, 70), "bias": (2, 2, 70, 70), "shared bias": (1, 1, 70, 70)}[
        kind
    ]
    mask = normal(shape, 2).requires_grad_() if "bias" in kind else normal(shape, 2) > -0.5
    more = {} if gamma is None else {"gamma": torch.tensor(gamma, requires_grad=True)}
    compare({**tensors, "attn_mask": mask, **more}, is_causal=True)


@pytest.mark.parametrize("gamma", [None, 0.7])
def test_heads_that_see_other_keys(gamma):
    """Votes follow the selection head, and what they sum up to acts where other heads see more."""
    hidden = torch.rand(2, 2, 40, 40, generator=torch.Generator("cpu").manual_seed(1), device="cpu") < 0.2
    mask = torch.where(hidden.to(DEVICE), -torch.inf, normal((2, 2, 40, 40), 2)).requires_grad_()
    more = {} if gamma is None else {"gamma": torch.tensor(gamma, requires_grad=True)}
    compare({**drawn(40, B=2), "attn_mask": mask, **more}, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [CAUSAL, {"softcap": 3.0}], ids=str)
def test_temperatures(dtype, how):
    tensors = drawn(70, H=4, Hkv=2, Dv=24, dtype=dtype)
    compare({**tensors, **temperatures(tensors)}, **how)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"D": 129}, {"softcap": 3.0}),
        ({"Dv": 144, "dtype": torch.bfloat16}, CAUSAL),
    ],
    ids=str,
)
def test_temperatures_of_wide_heads(shape, how):
    """More than 128 features: dk and dv are made by kernels of their own."""
    tensors = drawn(40, H=4, Hkv=2, **shape)
    compare({**tensors, **temperatures(tensors)}, **how)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"L": 1}, {}),
        ({"L": 40, "D": 129}, {}),
        ({"L": 111, "H": 4, "Hkv": 2, "Dv": 24}, {}),
        ({"L": 130, "B": 2}, {"window": 40}),
        ({}, {"softcap": 2.0}),
        ({"dtype": torch.float16}, {}),
        ({"dtype": torch.bfloat16}, {}),
    ],
    ids=str,
)
def test_votes(shape, how):
    gamma = torch.tensor(0.7, requires_grad=True)
    compare({**drawn(**shape), "gamma": gamma}, is_causal=True, **how)


@pytest.mark.parametrize("L", [63, 130])
def test_few_votes_that_reach_far(sparse_votes, L):
    """With independent queries and keys the far keys are dead, and a wrong vote there could not be seen."""
    drawn = sparse_votes(1, 2, 2, L, 16, dtype=torch.float32)
    query, key, value = (x.detach().to(DEVICE).requires_grad_() for x in drawn)
    gamma = torch.tensor(1.0, requires_grad=True)
    compare({"query": query, "key": key, "value": value, "gamma": gamma}, is_causal=True)


@pytest.mark.parametrize("Hkv", [4, 2])
def test_formula_fixture(formulas, Hkv):
    given = formulas(a=0.5, Hkv=Hkv)
    tensors = {n: getattr(given, n).detach().float().requires_grad_() for n in ("query", "key", "value")}
    compare({**tensors, "gamma": torch.tensor(1.0, requires_grad=True)}, is_causal=True)


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


@pytest.mark.parametrize("Dv", [16, 144])
def test_gradients_through_dropout_are_those_of_the_kept_weights(Dv):
    L = 40
    tensors = drawn(L, Dv=Dv)
    upstream = torch.randn(1, 2, L, Dv)
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
    pair = normal((2, 16, 16), 1).requires_grad_()
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
