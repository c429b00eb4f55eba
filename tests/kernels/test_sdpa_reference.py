"""Plain attention: torch's own where that is defined; windows, soft caps and combined masks beside it."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.sdpa.reference import attention, attention_logits, eager_attention, masked_softmax
from attnrewrite.kernels.visibility import repeat_kv, visible

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def row_by_row(query, key, value, seen, *, softcap=None, bias=None):
    """The definition, one query at a time; ``seen`` is [L, S]."""
    B, H, L, D = query.shape
    group = H // key.shape[1]
    out = torch.zeros(B, H, L, value.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                keys = seen[i].nonzero().flatten()
                if len(keys) == 0:
                    continue
                logits = key[b, h // group, keys] @ query[b, h, i] / math.sqrt(D)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if bias is not None:
                    logits = logits + bias[h, i, keys]
                out[b, h, i] = torch.softmax(logits, 0) @ value[b, h // group, keys]
    return out


class TestVisible:
    def test_none_when_every_key_is_visible(self):
        assert visible(3, 4) is None

    def test_causal_counts_from_the_first(self):
        assert torch.equal(visible(2, 4, is_causal=True), torch.ones(2, 4, dtype=torch.bool).tril())
        assert torch.equal(visible(4, 2, is_causal=True), torch.ones(4, 2, dtype=torch.bool).tril())

    def test_window_holds_the_query_itself_and_those_just_before(self):
        seen = visible(5, 5, is_causal=True, window=2)
        assert seen.int().tolist() == [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 0, 1, 1],
        ]

    def test_masks_narrow_it(self):
        boolean = torch.tensor([True, False, True])
        additive = torch.tensor([0.5, -math.inf, -1e30])
        for mask in (boolean, additive):
            assert visible(3, 3, attn_mask=mask).tolist() == [True, False, True]
            expected = [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
            assert visible(3, 3, is_causal=True, attn_mask=mask).int().tolist() == expected

    def test_repeat_kv_keeps_groups_together(self):
        states = torch.arange(2.0).reshape(1, 2, 1, 1)
        assert repeat_kv(states, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]


class TestAgainstTorch:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal"])
    def test_bit_for_bit_where_torch_defines_it(self, random_qkv, dtype, mask):
        query, key, value = random_qkv(2, 4, 2, 9, 8, S=13, dtype=dtype)
        boolean = torch.arange(13) < torch.tensor([13, 6]).reshape(2, 1, 1, 1)
        arguments = {
            "none": {},
            "boolean": {"attn_mask": boolean},
            "additive": {"attn_mask": torch.zeros(boolean.shape, dtype=dtype).masked_fill(~boolean, -2.5)},
            "causal": {"is_causal": True, "scale": 0.3},
        }[mask] | {"enable_gqa": True}
        torchs = F.scaled_dot_product_attention(query, key, value, **arguments)
        assert torch.equal(attention(query, key, value, **arguments), torchs)

    @pytest.mark.parametrize("function", [attention, eager_attention])
    def test_causal_together_with_a_mask(self, random_qkv, function):
        tensors = random_qkv(2, 3, 3, 9, 8)
        real = torch.arange(9) >= torch.tensor([0, 4]).reshape(2, 1, 1, 1)
        both = torch.ones(9, 9, dtype=torch.bool).tril() & real
        expected = F.scaled_dot_product_attention(*tensors, attn_mask=both)
        torch.testing.assert_close(function(*tensors, attn_mask=real, is_causal=True), expected, **CLOSE)
        bias = torch.linspace(-1, 1, 27, dtype=torch.float64).reshape(3, 1, 9)
        expected = F.scaled_dot_product_attention(
            *tensors, attn_mask=bias.expand(1, 3, 9, 9).masked_fill(~both, -math.inf)
        )
        padded = bias.expand(2, 3, 1, 9).masked_fill(~real, -math.inf)
        torch.testing.assert_close(function(*tensors, attn_mask=padded, is_causal=True), expected, **CLOSE)

    @pytest.mark.parametrize("L", [1, 2, 3, 63, 111])
    def test_eager_form_equals_torch(self, random_qkv, L):
        tensors = random_qkv(2, 4, 2, L, 16, S=63, Dv=5)
        torchs = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
        eager = eager_attention(*tensors, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(eager, torchs, **CLOSE)

    @pytest.mark.parametrize("window", [9, 10, 99])
    def test_window_of_the_whole_length_is_no_window(self, random_qkv, window):
        tensors = random_qkv(1, 2, 2, 9, 8)
        whole = attention(*tensors, is_causal=True)
        torch.testing.assert_close(attention(*tensors, is_causal=True, window=window), whole, **CLOSE)

    def test_a_large_soft_cap_is_none(self, random_qkv):
        tensors = random_qkv(1, 2, 2, 9, 8)
        capped = attention(*tensors, is_causal=True, softcap=1e6)
        torch.testing.assert_close(capped, attention(*tensors, is_causal=True), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_strided_inputs(self, random_qkv, softcap):
        tensors = random_qkv(2, 3, 3, 17, 8)
        strided = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        assert not any(tensor.is_contiguous() for tensor in strided)
        torch.testing.assert_close(attention(*strided, softcap=softcap), attention(*tensors, softcap=softcap), **CLOSE)


@st.composite
def shapes(draw):
    Hkv = draw(st.integers(1, 3))
    return SimpleNamespace(
        Hkv=Hkv,
        H=Hkv * draw(st.integers(1, 3)),
        L=draw(st.integers(1, 9)),
        S=draw(st.integers(1, 9)),
        D=draw(st.integers(1, 8)),
        Dv=draw(st.integers(1, 8)),
        window=draw(st.none() | st.integers(1, 10)),
        softcap=draw(st.none() | st.floats(0.5, 50)),
        masking=draw(st.sampled_from(["none", "boolean", "additive"])),
        seed=draw(st.integers(0, 2**16)),
    )


class TestDefinition:
    @settings(max_examples=60, deadline=None)
    @given(shape=shapes())
    def test_row_by_row(self, shape):
        source = torch.Generator().manual_seed(shape.seed)
        L, S, H, Hkv = shape.L, shape.S, shape.H, shape.Hkv

        def draw(*size):
            return torch.randn(size, generator=source, dtype=torch.float64)

        query, key, value = draw(2, H, L, shape.D), draw(2, Hkv, S, shape.D), draw(2, Hkv, S, shape.Dv)
        allowed, bias = draw(L, S) > -0.5, draw(H, L, S)
        seen = torch.ones(L, S, dtype=torch.bool).tril()
        if shape.window is not None:
            seen &= torch.arange(L)[:, None] - torch.arange(S) < shape.window
        if shape.masking != "none":
            seen &= allowed
        additive = shape.masking == "additive"
        mask = {"none": None, "boolean": allowed, "additive": bias.masked_fill(~allowed, -math.inf)}[shape.masking]
        arguments = {"is_causal": True, "window": shape.window, "enable_gqa": True, "softcap": shape.softcap}
        expected = row_by_row(query, key, value, seen, softcap=shape.softcap, bias=bias if additive else None)
        for function in (attention, eager_attention):
            torch.testing.assert_close(function(query, key, value, mask, **arguments), expected, **CLOSE)

    @pytest.mark.parametrize("arguments", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
    @pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
    def test_query_without_keys_gives_zero_and_finite_gradients(self, random_qkv, arguments, additive):
        tensors = random_qkv(1, 2, 2, 6, 4)
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        mask[3] = False
        if additive:
            mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~mask, -math.inf)
        out = attention(*tensors, attn_mask=mask, **arguments)
        assert (out[:, :, 3] == 0).all()
        assert (out[:, :, [0, 1, 2, 4, 5]] != 0).all()
        grads = torch.autograd.grad(out.sum(), tensors)
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, :, 3] == 0).all()

    def test_weights_of_visible_keys_only(self):
        weights = masked_softmax(torch.zeros(1, 1, 2, 3), torch.tensor([[True, True, False], [False] * 3]))
        assert weights[0, 0].tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]

    @pytest.mark.parametrize("softcap", [None, 1.5])
    def test_gradients_against_finite_differences(self, random_qkv, softcap):
        tensors = random_qkv(1, 2, 1, 5, 3)
        bias = torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(1, 2, 5, 5).requires_grad_()

        def run(query, key, value, bias):
            return attention(query, key, value, bias, is_causal=True, enable_gqa=True, window=3, softcap=softcap)

        assert torch.autograd.gradcheck(run, (*tensors, bias))

    def test_the_cap_bounds_the_logits_before_the_bias(self, random_qkv):
        query, key, _ = random_qkv(1, 2, 2, 9, 8)
        logits = attention_logits(100 * query, key, torch.full((9, 9), 10.0), softcap=2.0)
        assert ((logits - 10).abs() <= 2).all()

    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_dropout(self, random_qkv, softcap):
        tensors = [tensor.detach() for tensor in random_qkv(1, 1, 1, 40, 8)]
        torch.manual_seed(0)
        dropped = attention(*tensors, dropout_p=0.5, softcap=softcap)
        assert not torch.equal(dropped, attention(*tensors, softcap=softcap))
        assert (attention(*tensors, dropout_p=1.0, softcap=3.0) == 0).all()


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("arguments", [{}, {"softcap": 4.0}, {"window": 20}], ids=["plain", "softcap", "window"])
    def test_no_worse_than_ordinary_pytorch(self, random_qkv, assert_no_worse, dtype, arguments):
        tensors = random_qkv(2, 2, 2, 111, 32, dtype=dtype)
        exact = attention(*(tensor.double() for tensor in tensors), is_causal=True, **arguments)
        query, key, value = tensors
        logits = query @ key.mT / math.sqrt(32)
        if "softcap" in arguments:
            logits = 4.0 * torch.tanh(logits / 4.0)
        seen = visible(111, 111, is_causal=True, window=arguments.get("window"))
        ordinary = logits.masked_fill(~seen, -math.inf).softmax(-1) @ value
        ours = attention(*tensors, is_causal=True, **arguments)
        assert ours.dtype == dtype
        assert_no_worse(ours, ordinary, exact)

    def test_autocast_does_not_reach_the_soft_cap(self, random_qkv):
        tensors = random_qkv(1, 2, 2, 9, 8, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            under = attention(*tensors, softcap=3.0)
        assert torch.equal(under, attention(*tensors, softcap=3.0))


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"query": torch.zeros(6, 8)}, ("query", "2 dimensions", "6 x 8")),
            ({"key": torch.zeros(1, 4, 6, 8, dtype=torch.int64)}, ("key", "torch.int64")),
            ({"value": torch.zeros(1, 4, 6, 8, dtype=torch.float16)}, ("torch.float32", "torch.float16")),
            ({"value": torch.zeros(1, 4, 6, 8, device="meta")}, ("cpu", "meta")),
            ({"key": torch.zeros(2, 4, 6, 8)}, ("query 1", "key 2")),
            ({"key": torch.zeros(1, 4, 6, 7)}, ("query 8", "key 7")),
            ({"value": torch.zeros(1, 4, 5, 8)}, ("key 6", "value 5")),
            ({"value": torch.zeros(1, 2, 6, 8)}, ("key 4", "value 2")),
            ({"key": torch.zeros(1, 2, 6, 8), "value": torch.zeros(1, 2, 6, 8)}, ("4 heads", "have 2")),
            (
                {"key": torch.zeros(1, 3, 6, 8), "value": torch.zeros(1, 3, 6, 8), "enable_gqa": True},
                ("4 heads", "the 3 heads"),
            ),
            ({"attn_mask": torch.zeros(6, 6, dtype=torch.int64)}, ("torch.int64", "torch.bool")),
            ({"attn_mask": torch.zeros(6, 6, dtype=torch.float64)}, ("torch.float64", "torch.float32")),
            ({"attn_mask": torch.zeros(6, 6, device="meta")}, ("cpu", "meta")),
            ({"attn_mask": torch.zeros(6, 5)}, ("6 x 5", "1 x 4 x 6 x 6")),
            ({"attn_mask": torch.zeros(1, 1, 1, 6, 6)}, ("1 x 1 x 1 x 6 x 6", "1 x 4 x 6 x 6")),
            ({"window": 3}, ("3", "False")),
            ({"window": 0, "is_causal": True}, ("0",)),
            ({"softcap": -1.0}, ("-1.0",)),
            ({"dropout_p": -0.1}, ("-0.1",)),
        ],
    )
    def test_say_both_sides(self, change, says):
        arguments = {name: torch.zeros(1, 4, 6, 8) for name in ("query", "key", "value")} | change
        with pytest.raises(LoweringError) as raised:
            attention(**arguments)
        assert raised.value.code == "AR402"
        assert all(part in raised.value.detail for part in says), raised.value.detail
