"""Properties of the ssa reference: exact ones, shapes, precision, tracing, wrong arguments."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ssa_support import CLOSE, causal, spikiness_of, weights_and_lse
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.ssa.op import ssa_attention as in_strips
from attnrewrite.kernels.ssa.reference import ssa_attention, temperature

pytestmark = [
    pytest.mark.usefixtures("in_both_forms"),
    pytest.mark.parametrize(
        "in_both_forms",
        [
            ("ssa_attention", ssa_attention, 1 << 22),
            ("ssa_attention", in_strips, 1 << 22),
            ("ssa_attention", in_strips, 60),
        ],
        ids=["dense", "one strip", "strips"],
        indirect=True,
    ),
]


def draw_temperatures(random_qkv, B, H, Hkv, L, D, **options):
    query, key, value = random_qkv(B, H, Hkv, L, D, **options)
    source = torch.Generator().manual_seed(7)
    taus = (0.3 + 2 * torch.rand(B, heads, L, generator=source, dtype=torch.float64) for heads in (H, Hkv))
    return (query, key, value, *(tau.requires_grad_() for tau in taus))


@st.composite
def shapes(draw):
    Hkv = draw(st.integers(1, 3))
    return SimpleNamespace(
        B=draw(st.integers(1, 2)),
        Hkv=Hkv,
        H=Hkv * draw(st.integers(1, 3)),
        L=draw(st.integers(1, 12)),
        S=draw(st.integers(1, 12)),
        D=draw(st.integers(1, 8)),
        Dv=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 2**16)),
    )


def whole_layer(query, key, value, gate, gain, positions):
    taus = [temperature(projection, gate, gain, positions) for projection in (query, value)]
    return ssa_attention(query, key, value, *taus, is_causal=True)


class TestExactProperties:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("causality", [{"is_causal": True}, {}], ids=["causal", "full"])
    def test_temperature_one_equals_sdpa(self, random_qkv, dtype, causality):
        query, key, value = random_qkv(2, 4, 2, 17, 8, dtype=dtype)
        out = ssa_attention(query, key, value, torch.ones(2, 4, 17), torch.ones(2, 2, 17), enable_gqa=True, **causality)
        assert out.dtype == dtype
        if ssa_attention is in_strips:
            plain = F.scaled_dot_product_attention(
                query.double(), key.double(), value.double(), enable_gqa=True, **causality
            )
            torch.testing.assert_close(out, plain.to(dtype))
        else:
            plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **causality)
            assert torch.equal(out, plain)

    def test_equals_sdpa_of_scaled_tensors(self, random_qkv):
        query, key, value, tau_q, tau_v = draw_temperatures(random_qkv, 2, 4, 2, 17, 8)
        out = ssa_attention(query, key, value, tau_q, tau_v, is_causal=True, enable_gqa=True)
        plain = F.scaled_dot_product_attention(
            tau_q[..., None] * query, key, tau_v[..., None] * value, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out, plain, **CLOSE)

    def test_constant_temperatures_are_scale_and_factor(self, random_qkv):
        query, key, value = random_qkv(2, 2, 2, 17, 4)
        ones = torch.ones(2, 2, 17, dtype=torch.float64)
        sharp = ssa_attention(query, key, value, 1.7 * ones, ones, is_causal=True)
        plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.7 / 2)
        torch.testing.assert_close(sharp, plain, **CLOSE)
        large = ssa_attention(query, key, value, ones, 1.7 * ones, is_causal=True)
        plain = 1.7 * F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(large, plain, **CLOSE)

    def test_value_temperature_stays_out_of_the_normaliser(self, random_qkv):
        query, key, value, tau_q, tau_v = draw_temperatures(random_qkv, 1, 2, 2, 9, 4)
        once = ssa_attention(query, key, value, tau_q, tau_v, is_causal=True)
        twice = ssa_attention(query, key, value, tau_q, 2 * tau_v, is_causal=True)
        assert torch.equal(twice, 2 * once)

    def test_query_temperature_keeps_the_order_and_sharpens(self, random_qkv):
        query, key, _ = random_qkv(2, 2, 2, 33, 8)
        ones = torch.ones(2, 2, 33, dtype=torch.float64)
        previous = None
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            weights, _ = weights_and_lse(query, key, factor * ones)
            entropy = torch.special.entr(weights).sum(-1)
            order = weights.argsort(dim=-1, stable=True, descending=True)
            if previous is not None:
                assert (entropy <= previous[0] + 1e-14).all()
                assert (weights.amax(-1) >= previous[1] - 1e-14).all()
                for i in range(33):
                    assert torch.equal(order[:, :, i, : i + 1], previous[2][:, :, i, : i + 1])
            previous = entropy, weights.amax(-1), order

    def test_query_temperature_zero_gives_uniform_weights(self, random_qkv):
        query, key, value, _, tau_v = draw_temperatures(random_qkv, 1, 2, 2, 9, 4)
        zero = torch.zeros(1, 2, 9, dtype=torch.float64, requires_grad=True)
        out = ssa_attention(query, key, value, zero, tau_v, is_causal=True)
        scaled = tau_v[..., None] * value
        mean = scaled.cumsum(2) / torch.arange(1, 10, dtype=torch.float64)[:, None]
        torch.testing.assert_close(out, mean, **CLOSE)
        (grad,) = torch.autograd.grad((out**2).sum(), zero)
        assert grad.isfinite().all()

    def test_negative_query_temperature_turns_the_order(self, random_qkv):
        query, key, value, tau_q, tau_v = draw_temperatures(random_qkv, 1, 2, 2, 9, 4)
        out = ssa_attention(query, key, value, -tau_q, tau_v, is_causal=True)
        torch.testing.assert_close(out, ssa_attention(-query, key, value, tau_q, tau_v, is_causal=True), **CLOSE)

    def test_no_leak_from_the_future(self, random_qkv):
        data = [tensor.detach() for tensor in draw_temperatures(random_qkv, 2, 2, 2, 33, 8)]
        changed = [tensor.clone() for tensor in data]
        for tensor in changed:
            tensor[:, :, 20:] = 3 * tensor[:, :, 20:].flip(2) + 1
        before, after = (ssa_attention(*tensors, is_causal=True) for tensors in (data, changed))
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert not torch.equal(before[:, :, 20:], after[:, :, 20:])

    @pytest.mark.parametrize("pad", [1, 4])
    def test_left_padding_changes_nothing(self, random_qkv, pad):
        L = 15
        tensors = random_qkv(1, 2, 2, L, 8)
        gate = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64).reshape(2, 8)

        def layer(query, key, value, positions, **mask):
            taus = [temperature(projection, gate, 0.3, positions) for projection in (query, value)]
            return ssa_attention(query, key, value, *taus, is_causal=True, **mask)

        positions = torch.arange(1, L + 1)
        mask = (positions > pad).reshape(1, 1, 1, L)
        padded = layer(*tensors, positions - pad, attn_mask=mask)
        alone = layer(*(tensor[:, :, pad:] for tensor in tensors), positions[:-pad])
        torch.testing.assert_close(padded[:, :, pad:], alone, **CLOSE)
        assert (padded[:, :, :pad] == 0).all()

    def test_packed_documents_equal_separate_runs(self, random_qkv):
        data = draw_temperatures(random_qkv, 1, 2, 2, 15, 8)
        document = torch.tensor([0] * 6 + [1] * 9)
        packed = ssa_attention(*data, attn_mask=document[:, None] == document, is_causal=True)
        for part in (slice(0, 6), slice(6, 15)):
            alone = ssa_attention(*(tensor[:, :, part] for tensor in data), is_causal=True)
            torch.testing.assert_close(packed[:, :, part], alone, **CLOSE)

    def test_rows_computed_alone_equal_the_whole(self, random_qkv):
        query, key, value, tau_q, tau_v = draw_temperatures(random_qkv, 1, 4, 2, 15, 8)
        whole = ssa_attention(query, key, value, tau_q, tau_v, is_causal=True, enable_gqa=True)
        folded = tau_v[..., None] * value  # what a cache holds
        for i in range(15):
            row = ssa_attention(
                query[:, :, i : i + 1],
                key[:, :, : i + 1],
                folded[:, :, : i + 1],
                tau_q[:, :, i : i + 1],
                torch.ones(1, 2, i + 1, dtype=torch.float64),
                enable_gqa=True,
            )
            torch.testing.assert_close(row, whole[:, :, i : i + 1], **CLOSE)

    def test_commutes_with_rotation(self, random_qkv):
        query, key, value, tau_q, tau_v = draw_temperatures(random_qkv, 1, 2, 2, 9, 8)
        angle = torch.arange(9, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])

        def rotate(states):
            left, right = states.chunk(2, dim=-1)
            cos, sin = angle.cos(), angle.sin()
            return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)

        after = ssa_attention(rotate(query), rotate(key), value, tau_q, tau_v, is_causal=True)
        before = F.scaled_dot_product_attention(
            rotate(tau_q[..., None] * query), rotate(key), tau_v[..., None] * value, is_causal=True
        )
        torch.testing.assert_close(after, before, **CLOSE)

    def test_bias_is_not_scaled_and_the_cap_comes_after_the_temperature(self, random_qkv):
        query, key, value, tau_q, tau_v = draw_temperatures(random_qkv, 1, 2, 2, 9, 8)
        bias = -0.5 * (torch.arange(9)[:, None] - torch.arange(9)).abs().double()
        for softcap in (None, 1.5):
            logits = tau_q[..., None] * (query @ key.mT) / math.sqrt(8)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            expected = masked_softmax(logits + bias, causal(9)) @ (tau_v[..., None] * value)
            out = ssa_attention(query, key, value, tau_q, tau_v, bias, is_causal=True, softcap=softcap)
            torch.testing.assert_close(out, expected, **CLOSE)

    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_gradients_against_finite_differences(self, random_qkv, softcap):
        data = draw_temperatures(random_qkv, 1, 2, 1, 5, 3)

        def layer(*tensors):
            return ssa_attention(*tensors, is_causal=True, enable_gqa=True, softcap=softcap)

        assert torch.autograd.gradcheck(layer, data)

    def test_gradients_of_temperatures_are_row_products(self, random_qkv):
        query, key, value, tau_q, tau_v = draw_temperatures(random_qkv, 1, 2, 2, 9, 8)
        scaled = [
            (tau[..., None] * states).detach().requires_grad_() for tau, states in ((tau_q, query), (tau_v, value))
        ]
        plain = F.scaled_dot_product_attention(scaled[0], key, scaled[1], is_causal=True)
        dq, dv = torch.autograd.grad((plain**3).sum(), scaled)
        out = ssa_attention(query, key, value, tau_q, tau_v, is_causal=True)
        dtau_q, dtau_v = torch.autograd.grad((out**3).sum(), (tau_q, tau_v))
        torch.testing.assert_close(dtau_q, (dq * query).sum(-1), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(dtau_v, (dv * value).sum(-1), rtol=1e-11, atol=1e-12)

    def test_spikiness_of_uniform_and_one_hot_rows(self):
        rows = torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
        assert spikiness_of(rows, torch.ones(2, 4, dtype=torch.bool)).tolist() == [1.0, 0.25]


class TestShapes:
    @settings(max_examples=40, deadline=None)
    @given(shape=shapes())
    def test_equals_the_definition(self, shape):
        source = torch.Generator().manual_seed(shape.seed)

        def draw(*size):
            return torch.randn(size, generator=source, dtype=torch.float64)

        B, H, Hkv, L, S = shape.B, shape.H, shape.Hkv, shape.L, shape.S
        query, key, value = draw(B, H, L, shape.D), draw(B, Hkv, S, shape.D), draw(B, Hkv, S, shape.Dv)
        tau_q, tau_v = draw(B, H, L), draw(B, Hkv, S)
        keys, scaled = (tensor.repeat_interleave(H // Hkv, 1) for tensor in (key, tau_v.unsqueeze(-1) * value))
        weights = (tau_q.unsqueeze(-1) * (query @ keys.mT) / math.sqrt(shape.D)).softmax(-1)
        out = ssa_attention(query, key, value, tau_q, tau_v, enable_gqa=True)
        torch.testing.assert_close(out, weights @ scaled, **CLOSE)

    @pytest.mark.parametrize("L", [1, 2, 3, 63, 111])
    def test_odd_lengths_and_strides(self, random_qkv, L):
        data = [tensor.detach() for tensor in draw_temperatures(random_qkv, 2, 4, 2, L, 8)]
        out = ssa_attention(*data, is_causal=True, enable_gqa=True)
        strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in data]
        torch.testing.assert_close(ssa_attention(*strided, is_causal=True, enable_gqa=True), out, **CLOSE)


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("inputs", ["random_qkv", "sparse_votes"])
    def test_no_worse_than_ordinary_pytorch(self, request, assert_no_worse, inputs, dtype):
        draw = request.getfixturevalue(inputs)
        for seed in range(3):
            data = draw_temperatures(draw, 2, 4, 4, 111, 32, dtype=dtype, seed=seed)
            exact_data = [tensor.detach().double().requires_grad_() for tensor in data]
            query, key, value, tau_q, tau_v = data
            ours = ssa_attention(query, key, value, tau_q.float(), tau_v.float(), is_causal=True)
            ordinary = F.scaled_dot_product_attention(
                tau_q.to(dtype)[..., None] * query, key, tau_v.to(dtype)[..., None] * value, is_causal=True
            )
            exact = ssa_attention(*exact_data, is_causal=True)
            assert ours.dtype == dtype
            assert_no_worse(ours, ordinary, exact, "output")
            upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            grads = zip(
                torch.autograd.grad(ours, data, upstream),
                torch.autograd.grad(ordinary, data, upstream),
                torch.autograd.grad(exact, exact_data, upstream.double()),
                strict=True,
            )
            for name, trio in zip(("dq", "dk", "dv", "dtau_q", "dtau_v"), grads, strict=True):
                # dtau = dq . q is a sum over D of products rounded to 16 bit: its largest error is one chance
                # cancellation, up to 2.4 x apart between two equally precise runs.
                assert_no_worse(*trio, name, largest=not name.startswith("dtau"))


class TestTracing:
    def test_compiled_forward_and_backward(self, random_qkv, quick_inductor):
        compiled = torch.compile(whole_layer, backend="inductor", dynamic=True, fullgraph=True)
        for L in (12, 33):
            tensors = random_qkv(2, 2, 2, L, 8, dtype=torch.float32)
            gate = torch.linspace(-0.5, 0.5, 16).reshape(2, 8).requires_grad_()
            gain = torch.tensor(0.2, requires_grad=True)
            inputs = (*tensors, gate, gain)
            positions = torch.arange(1, L + 1)
            ours, plain = compiled(*inputs, positions), whole_layer(*inputs, positions)
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
            for found, expected in zip(
                torch.autograd.grad(ours.square().sum(), inputs),
                torch.autograd.grad(plain.square().sum(), inputs),
                strict=True,
            ):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mode", ["real", "symbolic"])
    def test_make_fx(self, random_qkv, mode):
        tensors = [tensor.detach() for tensor in random_qkv(1, 2, 2, 12, 8)]
        gate = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64).reshape(2, 8)
        inputs = (*tensors, gate, torch.tensor(0.2, dtype=torch.float64), torch.arange(1, 13))
        traced = make_fx(whole_layer, tracing_mode=mode)(*inputs)
        torch.testing.assert_close(traced(*inputs), whole_layer(*inputs), **CLOSE)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"query_temperature": torch.ones(1, 4, 5)}, ("query_temperature", "1 x 4 x 5", "1 x 4 x 6")),
            ({"query_temperature": torch.ones(1, 4, 6, 1)}, ("1 x 4 x 6 x 1", "1 x 4 x 6")),
            ({"value_temperature": torch.ones(1, 4, 6)}, ("value_temperature", "1 x 4 x 6", "1 x 2 x 6")),
            ({"value_temperature": torch.ones(1, 2, 6, dtype=torch.int64)}, ("torch.int64",)),
            ({"enable_gqa": False}, ("4 heads", "have 2")),
            ({"attn_mask": torch.ones(6, 7, dtype=torch.bool)}, ("6 x 7", "1 x 4 x 6 x 6")),
            ({"window": 2}, ("2", "False")),
            ({"softcap": 0.0}, ("0.0",)),
        ],
    )
    def test_attention_says_both_sides(self, change, says):
        arguments = {
            "query": torch.zeros(1, 4, 6, 8),
            "key": torch.zeros(1, 2, 6, 8),
            "value": torch.zeros(1, 2, 6, 8),
            "query_temperature": torch.ones(1, 4, 6),
            "value_temperature": torch.ones(1, 2, 6),
            "enable_gqa": True,
        } | change
        with pytest.raises(LoweringError) as raised:
            ssa_attention(**arguments)
        assert raised.value.code == "AR402"
        assert all(part in raised.value.detail for part in says), raised.value.detail

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"projection": torch.zeros(4, 6, 8)}, ("3 dimensions", "4")),
            ({"projection": torch.zeros(1, 4, 6, 8, dtype=torch.int64)}, ("torch.int64",)),
            ({"gate": torch.zeros(4, 7)}, ("4 x 7", "4 x 8")),
            ({"gate": torch.zeros(32)}, ("32", "4 x 8")),
            ({"positions": torch.arange(5)}, ("5", "1 x 4 x 6")),
            ({"gain": torch.ones(4)}, ("1 dimensions", "0-d")),
        ],
    )
    def test_temperature_says_both_sides(self, change, says):
        arguments = {
            "projection": torch.zeros(1, 4, 6, 8),
            "gate": torch.zeros(4, 8),
            "gain": 0.1,
            "positions": torch.arange(1, 7),
        } | change
        with pytest.raises(LoweringError) as raised:
            temperature(**arguments)
        assert raised.value.code == "AR402"
        assert all(part in raised.value.detail for part in says), raised.value.detail
