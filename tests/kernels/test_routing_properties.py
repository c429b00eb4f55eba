"""Properties of routing attention: exact ones, shapes, memory, precision, tracing."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_support import CAUSAL, CLOSE, RULES, by_definition, detached, padding, random_routing
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from attnrewrite.kernels.routing import attend as attend_file
from attnrewrite.kernels.routing.prepare import Options, Routed, prepare
from attnrewrite.kernels.routing.reference import routing_attention


class TestExactProperties:
    @pytest.mark.parametrize(
        "options",
        [
            {"rule": "topw", "window_size": 17},
            {"rule": "topw", "window_size": 40},
            {"window_size": 34},
            {"window_size": 17, **CAUSAL},
            {"window_size": 90, "window": 5, **CAUSAL},
            {**CAUSAL},
        ],
    )
    def test_one_cluster_of_all_tokens_is_plain_attention(self, options):
        query, key, value, centroids = random_routing(2, 4, 2, 17, 8, 1)
        out = routing_attention(query, key, value, centroids, enable_gqa=True, scale=0.3, **options)
        seen = torch.ones(17, 17, dtype=torch.bool)
        if options.get("is_causal"):
            seen = seen.tril() & ~seen.tril(-options.get("window", 17))
        plain = F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True, scale=0.3)
        torch.testing.assert_close(out, plain, **CLOSE)

    @RULES
    def test_one_cluster_of_shared_tokens_is_attention_without_the_diagonal(self, rule):
        query, _, value, centroids = random_routing(2, 3, 3, 17, 8, 1)
        out = routing_attention(
            query, query, value, centroids, rule=rule, window_size=17, shared_qk=True, is_causal=True, paper_causal=True
        )
        logits = query @ query.mT / math.sqrt(8)
        logits = logits.masked_fill(torch.eye(17, dtype=torch.bool), -5e4)
        logits = logits.masked_fill(~torch.ones(17, 17, dtype=torch.bool).tril(), -math.inf)
        torch.testing.assert_close(out, logits.softmax(-1) @ value, **CLOSE)
        assert torch.equal(out[:, :, 0], value[:, :, 0])

    @RULES
    def test_normed_logits_forget_the_length_of_query_and_key(self, rule):
        query, key, value, centroids = random_routing(1, 2, 2, 17, 8, 3)
        out = routing_attention(query, key, value, centroids, rule=rule, logits="normed")
        longer = routing_attention(100 * query, 3 * key, value, centroids, rule=rule, logits="normed")
        torch.testing.assert_close(longer, out, rtol=1e-5, atol=1e-5)

    @RULES
    @pytest.mark.parametrize("causality", [{}, CAUSAL], ids=["full", "causal"])
    def test_labels_of_clusters_do_not_matter(self, rule, causality):
        query, key, value, centroids = random_routing(2, 2, 2, 17, 8, 4)
        out, other = (
            routing_attention(query, key, value, mu, rule=rule, **causality)
            for mu in (centroids, centroids[:, torch.tensor([2, 0, 3, 1])])
        )
        torch.testing.assert_close(other, out, **CLOSE)

    @pytest.mark.parametrize("shared", [False, True])
    def test_no_leak_from_the_future(self, shared):
        data = detached(*random_routing(2, 2, 2, 33, 8, 4))
        for new in (torch.randn(2, 2, 13, 8, dtype=torch.float64), math.nan):
            changed = detached(*data)
            for tensor in changed[:3]:
                tensor[:, :, 20:] = new
            before, after = (
                routing_attention(*tensors, is_causal=True, window_size=5, shared_qk=shared)
                for tensors in (data, changed)
            )
            assert torch.equal(before[:, :, :20], after[:, :, :20])
            assert not torch.equal(before[:, :, 20:], after[:, :, 20:])

    @RULES
    def test_window_hides_old_keys(self, rule):
        query, key, value, centroids = random_routing(1, 2, 2, 17, 8, 3)
        options = {"rule": rule, "window_size": 6, **CAUSAL}
        out = routing_attention(query, key, value, centroids, window=4, **options)
        expected = by_definition(query, key, value, centroids, 6, rule=rule, causal=True, window=4)
        torch.testing.assert_close(out, expected, **CLOSE)
        wide = routing_attention(query, key, value, centroids, window=17, **options)
        assert torch.equal(wide, routing_attention(query, key, value, centroids, **options))

    def test_cross_attention(self):
        query, key, value, centroids = random_routing(2, 4, 2, 6, 8, 2, S=15)
        out = routing_attention(query, key, value, centroids, rule="topw", window_size=40, enable_gqa=True)
        plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        torch.testing.assert_close(out, plain, **CLOSE)
        mask = padding(15, 9, N=15)
        out = routing_attention(query, key, value, centroids, mask, rule="topw", window_size=40, enable_gqa=True)
        plain = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        torch.testing.assert_close(out, plain, **CLOSE)

    @RULES
    @pytest.mark.parametrize("size", [(2, 4, 17, 17), (4, 17, 17), (1, 1, 17, 17), (2, 4, 1, 17)])
    def test_bias(self, rule, size):
        query, key, value, centroids = random_routing(2, 4, 2, 17, 8, 3)
        bias = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        options = {"rule": rule, "window_size": 6}
        out = routing_attention(query, key, value, centroids, bias, enable_gqa=True, **options)
        expected = by_definition(query, key, value, centroids, 6, rule=rule, bias=bias)
        torch.testing.assert_close(out, expected, **CLOSE)
        found, wanted = (torch.autograd.grad(part.square().sum(), bias)[0] for part in (out, expected))
        torch.testing.assert_close(found, wanted, **CLOSE)

    def test_routing_before_rotation(self):
        """Other vectors may decide who meets whom than those that are scored."""
        query, key, value, centroids = random_routing(1, 2, 2, 9, 8, 3)
        turned = [states.flip(-1) for states in (query, key)]
        out = routing_attention(*turned, value, centroids, routing_query=query, routing_key=key, is_causal=True)
        back = routing_attention(query, key, value, centroids, is_causal=True)
        torch.testing.assert_close(out, back, **CLOSE)
        assert (routing_attention(*turned, value, centroids, is_causal=True) - back).abs().max() > 0.1

    @RULES
    @pytest.mark.parametrize("logits", ["raw", "normed"])
    def test_centers_are_subtracted_before_routing(self, rule, logits):
        query, key, value, centroids = random_routing(1, 4, 2, 9, 8, 3)
        centers = torch.randn(2, 2, 8, dtype=torch.float64)
        shifted = [
            states + center.repeat_interleave(states.shape[1] // 2, 0)[:, None]
            for states, center in zip((query, key), centers, strict=True)
        ]
        options = {"rule": rule, "enable_gqa": True, "logits": logits}
        out = routing_attention(*shifted, value, centroids, center_query=centers[0], center_key=centers[1], **options)
        if logits == "normed":
            expected = routing_attention(query, key, value, centroids, **options)
        else:
            expected = routing_attention(*shifted, value, centroids, routing_query=query, routing_key=key, **options)
        torch.testing.assert_close(out, expected, **CLOSE)

    @RULES
    def test_dropout_keeps_the_mean(self, rule):
        query, key, value, centroids = detached(*random_routing(1, 1, 1, 5, 4, 2))
        many = [tensor.expand(2000, -1, -1, -1) for tensor in (query, key, value)]
        torch.manual_seed(0)
        dropped = routing_attention(*many, centroids, dropout_p=0.25, rule=rule)
        whole = routing_attention(query, key, value, centroids, rule=rule)
        assert not torch.equal(dropped[0], whole[0])
        torch.testing.assert_close(dropped.mean(0), whole[0], rtol=0, atol=0.1)
        assert (routing_attention(*many, centroids, dropout_p=1.0, rule=rule) == 0).all()


@st.composite
def cases(draw):
    Hkv = draw(st.integers(1, 2))
    rule = draw(st.sampled_from(["topw", "argmax_window"]))
    shared = draw(st.booleans())
    N = draw(st.integers(1, 9))
    causal = draw(st.booleans())
    return SimpleNamespace(
        B=draw(st.integers(1, 2)),
        Hkv=Hkv,
        H=Hkv * (1 if shared else draw(st.integers(1, 2))),
        N=N,
        real=draw(st.integers(1, N)),
        D=draw(st.integers(2, 6)),
        Dv=draw(st.integers(1, 4)),
        C=draw(st.integers(1, 4)),
        w=draw(st.integers(1, 10)),
        window=draw(st.none() | st.integers(1, 9)) if causal else None,
        rule=rule,
        shared=shared,
        normed=draw(st.booleans()),
        causal=causal,
        seed=draw(st.integers(0, 2**16)),
    )


class TestShapes:
    @settings(max_examples=60, deadline=None)
    @given(case=cases())
    def test_equals_the_definition(self, case):
        tensors = random_routing(case.B, case.H, case.Hkv, case.N, case.D, case.C, Dv=case.Dv, seed=case.seed)
        query, key, value, centroids = detached(*tensors)
        if case.shared:
            key = query
        out = routing_attention(
            query,
            key,
            value,
            centroids,
            padding(*[case.real] * case.B, N=case.N),
            is_causal=case.causal,
            enable_gqa=True,
            window=case.window,
            rule=case.rule,
            window_size=case.w,
            shared_qk=case.shared,
            logits="normed" if case.normed else "raw",
            paper_causal=True,
        )
        expected = by_definition(
            *(tensor[:, :, : case.real] for tensor in (query, key, value)),
            centroids,
            case.w,
            rule=case.rule,
            shared=case.shared,
            normed=case.normed,
            causal=case.causal,
            window=case.window,
        )
        # LN0 of two dimensions is +-1 up to rounding of the mean; so is everything made of it.
        torch.testing.assert_close(out[:, :, : case.real], expected, rtol=1e-9, atol=1e-10)
        assert (out[:, :, case.real :] == 0).all()

    @RULES
    @pytest.mark.parametrize("N", [2, 63, 111])
    def test_odd_lengths_and_strides(self, rule, N):
        *tensors, centroids = detached(*random_routing(1, 4, 2, N, 8, 5, Dv=3))
        out = routing_attention(*tensors, centroids, rule=rule, enable_gqa=True)
        assert out.shape == (1, 4, N, 3)
        strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        torch.testing.assert_close(routing_attention(*strided, centroids, rule=rule, enable_gqa=True), out, **CLOSE)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func is not torch.ops.aten.expand.default:
            self.elements = max(self.elements, out.numel())
        return out


class TestMemory:
    @RULES
    @pytest.mark.parametrize("causality", [{}, CAUSAL], ids=["full", "causal"])
    def test_nothing_is_quadratic(self, monkeypatch, rule, causality):
        N = 1024
        *tensors, centroids = detached(*random_routing(1, 1, 1, N, 4, 16))
        whole = routing_attention(*tensors, centroids, rule=rule, window_size=32, **causality)
        monkeypatch.setattr(attend_file, "ELEMENTS", 2**15)
        with Largest() as largest:
            pieces = routing_attention(*tensors, centroids, rule=rule, window_size=32, **causality)
        assert largest.elements <= 2**15 < N * N / 16
        assert torch.equal(pieces, whole)

    @RULES
    def test_two_runs_are_equal_bit_for_bit(self, rule):
        *tensors, centroids = random_routing(2, 4, 2, 50, 8, 5)

        def run():
            out = routing_attention(*tensors, centroids, rule=rule, enable_gqa=True)
            return out, *torch.autograd.grad(out.square().sum(), tensors)

        assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def ordinary(query, key, value, queries, keys):
    """Gather, scaled_dot_product_attention in the dtype given, mean: what one would write without this library."""
    total = torch.zeros_like(query)
    count = torch.zeros(query.shape[:3], dtype=query.dtype).unsqueeze(-1)
    for c in range(queries.shape[2]):
        i, j = (part[:, :, c].unsqueeze(-1) for part in (queries, keys))
        q, k, v = (
            states.gather(2, index.expand(*index.shape[:3], states.shape[-1]))
            for states, index in ((query, i), (key, j), (value, j))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        total = total.scatter_add(2, i.expand_as(out), out)
        count = count.scatter_add(2, i, torch.ones_like(i, dtype=count.dtype))
    return total / count.clamp(min=1)


class TestLowPrecision:
    @RULES
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_no_worse_than_ordinary_pytorch(self, assert_no_worse, rule, dtype):
        for seed in range(2):
            *tensors, centroids = random_routing(1, 2, 2, 64, 32, 4, dtype=dtype, seed=seed)
            exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
            options = {"rule": rule, "window_size": 16, "is_causal": rule == "argmax_window"}
            ours = routing_attention(*tensors, centroids, **options)
            exact = routing_attention(*exact_tensors, centroids, **options)
            chosen = Options(rule, 16, is_causal=options["is_causal"])
            _, selection = prepare(Routed(*exact_tensors, centroids), chosen)
            queries, keys, _ = selection.block(0, selection.sizes[0])
            if rule == "topw":
                plain = ordinary(*tensors, queries, keys)
            else:
                seen = F.one_hot(keys + 1, 65).sum(-2)[..., 1:] > 0
                plain = F.scaled_dot_product_attention(*tensors, seen)
            assert ours.dtype == dtype
            assert_no_worse(ours, plain, exact, "output")
            upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            grads = zip(
                torch.autograd.grad(ours, tensors, upstream),
                torch.autograd.grad(plain, tensors, upstream),
                torch.autograd.grad(exact, exact_tensors, upstream.double()),
                strict=True,
            )
            for name, trio in zip(("dq", "dk", "dv"), grads, strict=True):
                assert_no_worse(*trio, name)

    def test_autocast_does_not_reach_the_routing(self):
        *tensors, centroids = random_routing(1, 2, 2, 40, 16, 4, dtype=torch.float32)
        for logits in ("raw", "normed"):
            with torch.autocast("cpu", torch.bfloat16):
                under = routing_attention(*tensors, centroids, logits=logits)
            assert torch.equal(under, routing_attention(*tensors, centroids, logits=logits))


class TestTracing:
    """Of one length: tracing symbolic shapes takes 10 to 90 seconds. The operator is traced with any length."""

    @RULES
    def test_traced_forward_and_backward(self, rule):
        compiled = torch.compile(routing_attention, backend="aot_eager", dynamic=False, fullgraph=True)
        *tensors, centroids = random_routing(1, 4, 2, 12, 8, 3, dtype=torch.float32)
        options = {"rule": rule, "enable_gqa": True, "window_size": 5, **CAUSAL}
        ours, plain = compiled(*tensors, centroids, **options), routing_attention(*tensors, centroids, **options)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        for found, expected in zip(
            torch.autograd.grad(ours.square().sum(), tensors),
            torch.autograd.grad(plain.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @RULES
    def test_make_fx(self, rule):
        data = detached(*random_routing(1, 4, 2, 12, 8, 3))

        def run(*data):
            return routing_attention(*data, rule=rule, enable_gqa=True)

        torch.testing.assert_close(make_fx(run)(*data)(*data), run(*data), **CLOSE)

    @RULES
    @pytest.mark.slow
    def test_make_fx_with_symbolic_sizes(self, rule):
        data = detached(*random_routing(1, 4, 2, 12, 8, 3))

        def run(*data):
            return routing_attention(*data, rule=rule, enable_gqa=True)

        torch.testing.assert_close(make_fx(run, tracing_mode="symbolic")(*data)(*data), run(*data), **CLOSE)
