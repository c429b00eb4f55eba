"""Sinks and ALiBi in every dense variant: the formula, every gradient, in strips and on generated kernels."""

import pytest
import torch
from dense_support import CAUSAL, compare, drawn, normal, temperatures

from attnrewrite import functional
from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.diagnostics import AttnRewriteError
from attnrewrite.kernels.sdpa.reference import eager_attention
from attnrewrite.kernels.selective import reference as selective_reference
from attnrewrite.kernels.ssa import reference as ssa_reference
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.symmetric import reference as symmetric_reference

VARIANTS = ("attention", "ssa_attention", "selective_attention", "symmetric_attention")
B, H, HKV, L, D, DV = 2, 4, 2, 7, 4, 3


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def given(name):
    query, key, value = made(B, H, L, D), made(B, HKV, L, D, seed=1), made(B, HKV, L, DV, seed=2)
    if name == "symmetric_attention":
        return key, value, made(H, D, D, seed=3)
    if name == "ssa_attention":
        return query, key, value, made(B, H, L, seed=3), made(B, HKV, L, seed=4)
    return query, key, value


def per_head():
    slopes = torch.tensor([0.5, 0.25, 1.0, 0.0], dtype=torch.float64)
    return made(H, seed=5), slopes.requires_grad_()


REFERENCES = {
    "attention": eager_attention,
    "ssa_attention": ssa_reference.ssa_attention,
    "selective_attention": selective_reference.selective_attention,
    "symmetric_attention": symmetric_reference.symmetric_attention,
}


def run(name, tensors, sinks, slopes, function=None, **options):
    function = function or getattr(functional, name)
    return function(*tensors, enable_gqa=True, sinks=sinks, alibi_slopes=slopes, **options)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("how", [{"is_causal": True}, {"is_causal": True, "window": 3}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize("budget", [60, 1 << 22])
def test_the_reference_and_its_gradients(name, how, budget, monkeypatch):
    monkeypatch.setattr(strips, "BUDGET", budget)
    tensors, added = given(name), per_head()
    ours, true = (run(name, tensors, *added, function, **how) for function in (None, REFERENCES[name]))
    upstream = made(*true.shape, seed=9)
    found, wanted = (torch.autograd.grad((x * upstream).sum(), (*tensors, *added)) for x in (ours, true))
    for a, b in zip((ours, *found), (true, *wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_against_differences(name):
    def out(sinks, slopes, *tensors):
        return run(name, tensors, sinks, slopes, is_causal=True, softcap=3.0)

    assert torch.autograd.gradcheck(out, (*per_head(), *given(name)))


@pytest.mark.parametrize("name", VARIANTS[:2])
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_is_a_bias(name, causal):
    tensors, (_, slopes) = given(name), per_head()
    lag = (torch.arange(L).unsqueeze(-1) - torch.arange(L)).abs()
    ours = run(name, tensors, None, slopes, is_causal=causal)
    bias = -slopes.view(H, 1, 1) * lag
    true = getattr(functional, name)(*tensors, attn_mask=bias, enable_gqa=True, is_causal=causal)
    assert torch.allclose(ours, true, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", VARIANTS)
def test_sinks_of_no_weight_and_of_all(name):
    tensors = given(name)
    none, all_of_it = torch.full((H,), -torch.inf), torch.full((H,), 1e4)
    plain = run(name, tensors, none.double(), None, is_causal=True)
    assert torch.allclose(plain, run(name, tensors, None, None, is_causal=True), rtol=1e-12, atol=1e-14)
    assert run(name, tensors, all_of_it.double(), None, is_causal=True).abs().max() == 0


def test_a_row_that_sees_no_key_gives_0():
    query, key, value = given("attention")
    hidden = torch.zeros(B, 1, 1, L, dtype=torch.bool)
    out = functional.attention(query, key, value, hidden, enable_gqa=True, sinks=per_head()[0])
    assert out.abs().max() == 0
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), (query, key, value)))


def test_steps_are_the_whole():
    tensors, (sinks, slopes) = [x.detach() for x in given("selective_attention")], [x.detach() for x in per_head()]
    whole = run("selective_attention", tensors, sinks, slopes)
    query, key, value = tensors
    state, outs = None, []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        out, state = functional.selective_decode(
            query[:, :, start:stop],
            key[:, :, :stop],
            value[:, :, :stop],
            state,
            enable_gqa=True,
            sinks=sinks,
            alibi_slopes=slopes,
        )
        outs.append(out)
    assert torch.allclose(torch.cat(outs, 2), whole, rtol=1e-12, atol=1e-14)


def test_torchs_own_checks():
    from attnrewrite.kernels.dense import op, selective_op, symmetric_op  # noqa: F401  # define operators

    operators, added = torch.ops.attnrewrite, per_head()
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    strip = (0.5, 0.0, True, None, None)
    ssa, symmetric = given("ssa_attention"), given("symmetric_attention")
    torch.library.opcheck(operators.ssa_attention.default, (*ssa, None, None, *strip, *added))
    torch.library.opcheck(operators.symmetric_attention.default, (*symmetric, None, None, *strip, False, *added))
    selective = (*given("selective_attention"), gamma, None, None, *strip, 1, True, None, None, *added)
    torch.library.opcheck(operators.selective_attention.default, selective)
    votes, protected = torch.rand(B, L, dtype=torch.float64), torch.zeros(B, L, dtype=torch.bool)
    step = (
        *given("selective_attention"),
        gamma,
        votes,
        protected,
        None,
        None,
        None,
        None,
        0.5,
        0.0,
        None,
        None,
        1,
        True,
    )
    torch.library.opcheck(operators.selective_decode.default, (*step, None, None, 1, *added))


@pytest.mark.parametrize(
    ("sinks", "slopes", "said"),
    [
        (torch.zeros(3), None, "sinks is 3; needed is H = 4"),
        (None, torch.zeros(1, 4), "alibi_slopes is 1 x 4; needed is H = 4"),
        (torch.zeros(4, dtype=torch.long), None, "sinks has dtype torch.int64"),
        (None, torch.zeros(4, device="meta"), "query is on cpu and alibi_slopes on meta"),
    ],
    ids=["heads", "dimensions", "dtype", "device"],
)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_does_not_fit(name, sinks, slopes, said):
    with pytest.raises(AttnRewriteError, match=said) as caught:
        run(name, given(name), sinks, slopes)
    assert caught.value.code == "AR402"


def added(*sizes, **more):
    """Tensors with sinks and slopes."""
    tensors = drawn(*sizes, **more)
    heads, device = tensors["query"].shape[1], tensors["query"].device
    sinks = torch.randn(heads, generator=torch.Generator("cpu").manual_seed(5), device="cpu")
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    return tensors | {n: x.to(device).requires_grad_() for n, x in (("sinks", sinks), ("alibi_slopes", slopes))}


@pytest.mark.triton
@pytest.mark.usefixtures("on_the_device")
class TestOnKernels:
    @pytest.mark.parametrize("length", [1, 63, 111, 130])
    def test_sizes(self, length):
        compare(added(length), **CAUSAL)

    @pytest.mark.parametrize(
        "how", [{}, {"is_causal": True, "window": 20}, {"softcap": 2.0}, {"is_causal": True, "softcap": 2.0}], ids=str
    )
    def test_forms(self, how):
        compare(added(40, H=4, Hkv=2, Dv=24), **how)

    def test_half_precision(self):
        compare(added(111, dtype=torch.bfloat16), **CAUSAL)

    def test_ssa(self):
        tensors = added(63)
        compare(tensors | temperatures(tensors), **CAUSAL)

    @pytest.mark.parametrize("causal", [True, False])
    def test_selective(self, causal):
        tensors = added(40, H=4, Hkv=2)
        compare(tensors | {"gamma": tensors["query"].new_tensor(0.5).requires_grad_()}, is_causal=causal)

    def test_few_queries(self):
        compare(added(5, S=300, H=4, Hkv=2))

    @pytest.mark.parametrize("pairwise", [True, False])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("alibi", [True, False])
    def test_symmetric(self, pairwise, causal, alibi):
        shared, value = (normal((1, 2, 40, 16), n).requires_grad_() for n in range(2))
        pair = normal((2, 16, 16), 2).requires_grad_() if pairwise else None
        sinks = torch.tensor([0.5, -1.0]).requires_grad_()
        slopes = torch.tensor([0.5, 0.25]).requires_grad_() if alibi else None
        learn = [x for x in (shared, value, pair, sinks, slopes) if x is not None]
        found = []
        for wanted in ("reference", "triton"):
            with functional.kernels(wanted):
                out = functional.symmetric_attention(
                    shared, value, pair, is_causal=causal, sinks=sinks, alibi_slopes=slopes
                )
            found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), learn)])
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= 3e-6 * b.norm()

    def test_a_step_of_selective_attention(self):
        tensors = {n: x.detach() for n, x in added(40, H=4, Hkv=2).items()}
        query, key, value = (tensors[n] for n in ("query", "key", "value"))
        more = {"enable_gqa": True, "sinks": tensors["sinks"], "alibi_slopes": tensors["alibi_slopes"]}
        with functional.kernels("triton"):
            _, state = functional.selective_decode(query[:, :, :39], key[:, :, :39], value[:, :, :39], **more)
            out, _ = functional.selective_decode(query[:, :, 39:], key, value, state, **more)
        true = functional.selective_attention(query, key, value, **more)[:, :, 39:]
        assert (out - true).norm() <= 3e-6 * true.norm()

    def test_gradients_that_nobody_asks_for_take_no_work(self):
        """The sum over |i - j| is a flag of the kernel: slopes as a buffer do not cost it."""
        from attnrewrite.kernels.dense.launch import NOTHING_MORE, Wanted

        assert Wanted(bias=False, slopes=False) == NOTHING_MORE
        tensors = drawn(20)
        call = Call(*(x.detach() for x in tensors.values()), how=Options(0.25, True, slopes=torch.tensor([0.5, 0.25])))
        assert call.flags()["ALIBI"]
        assert not call.flags()["SLOPE_GRADIENT"]
