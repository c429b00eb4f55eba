"""Properties of the selective reference: exact ones, shapes, precision."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_support import CLOSE, causal, dense_formula, parts

from attnrewrite.kernels.sdpa.reference import attention_logits, eager_attention, masked_softmax
from attnrewrite.kernels.selective.op import selective_attention as in_strips
from attnrewrite.kernels.selective.reference import selection_penalty, selective_attention
from attnrewrite.kernels.ssa.op import ssa_attention as ssa_in_strips

pytestmark = [
    pytest.mark.usefixtures("in_both_forms"),
    pytest.mark.parametrize(
        "in_both_forms",
        [
            ("selective_attention", selective_attention, 1 << 22),
            ("selective_attention", in_strips, 1 << 22),
            ("selective_attention", in_strips, 60),
        ],
        ids=["dense", "one strip", "strips"],
        indirect=True,
    ),
]


@st.composite
def shapes(draw):
    Hkv = draw(st.integers(1, 3))
    return SimpleNamespace(
        Hkv=Hkv,
        H=Hkv * draw(st.integers(1, 3)),
        L=draw(st.integers(1, 12)),
        D=draw(st.integers(1, 8)),
        Dv=draw(st.integers(1, 8)),
        window=draw(st.none() | st.integers(1, 14)),
        pad=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


def plain_attention(query, key, value, **options):
    """Plain attention, made as the form of selective attention that is tested is made."""
    if selective_attention is not in_strips:
        return eager_attention(query, key, value, **options)
    ones = (torch.ones(x.shape[:3]) for x in (query, value))
    return ssa_in_strips(query, key, value, *ones, **options)


def ordinary_selective(query, key, value):
    """What one writes in 16 bit: products in 16 bit, votes and softmax in float32."""
    L, D = query.shape[2:]
    logits = (query @ key.mT / math.sqrt(D)).float()
    votes = logits[:, 0].relu() * causal(L).tril(-1)
    votes[:, :, 0] = 0
    penalty = votes.cumsum(1) - votes
    weights = (logits - penalty[:, None]).masked_fill(~causal(L), -math.inf).softmax(-1)
    return weights.to(query.dtype) @ value


class TestExactProperties:
    def test_no_positive_vote_equals_sdpa(self, random_qkv):
        query, key, value = random_qkv(2, 3, 3, 17, 8)
        query = query.detach().abs()
        key = -key.detach().abs()
        out = selective_attention(query, key, value)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, is_causal=True), **CLOSE)

    @pytest.mark.parametrize("gamma", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_gamma_zero_equals_plain_attention_bit_for_bit(self, random_qkv, gamma, dtype):
        tensors = random_qkv(2, 4, 2, 19, 8, dtype=dtype)
        options = {"enable_gqa": True, "softcap": 20.0, "window": 7}
        out = selective_attention(*tensors, gamma=gamma, **options)
        plain = plain_attention(*tensors, is_causal=True, **options)
        assert torch.equal(out, plain)
        upstream = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        for ours, theirs in zip(
            torch.autograd.grad(out, tensors, upstream),
            torch.autograd.grad(plain, tensors, upstream),
            strict=True,
        ):
            assert torch.equal(ours, theirs)

    def test_first_three_rows_equal_sdpa(self, random_qkv):
        tensors = random_qkv(2, 3, 3, 17, 8)
        out = selective_attention(*tensors)
        plain = F.scaled_dot_product_attention(*tensors, is_causal=True)
        torch.testing.assert_close(out[:, :, :3], plain[:, :, :3], **CLOSE)
        assert (out[:, :, 5:] - plain[:, :, 5:]).abs().amax((0, 1, 3)).min() > 1e-3

    @pytest.mark.parametrize("L", [1, 2, 3])
    def test_up_to_three_tokens_equal_sdpa(self, random_qkv, L):
        tensors = random_qkv(2, 2, 2, L, 8)
        plain = F.scaled_dot_product_attention(*tensors, is_causal=True)
        torch.testing.assert_close(selective_attention(*tensors), plain, **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_penalty_grows_and_spares_self_successor_and_first(self, random_qkv, dtype):
        query, key, _ = random_qkv(2, 2, 2, 63, 8, dtype=dtype)
        penalty, state = selection_penalty(attention_logits(query, key)[:, 1], causal(63))
        assert (penalty >= 0).all()
        assert (penalty.diff(dim=1) >= 0).all()
        assert (state >= penalty[:, -1]).all()
        assert (penalty.diagonal(dim1=-2, dim2=-1) == 0).all()
        assert (penalty.diagonal(offset=-1, dim1=-2, dim2=-1) == 0).all()
        assert (penalty[:, :, 0] == 0).all()
        assert penalty.max() > 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_no_leak_from_the_future(self, random_qkv, dtype):
        tensors = [tensor.detach() for tensor in random_qkv(2, 4, 2, 33, 8, dtype=dtype)]
        changed = [tensor.clone() for tensor in tensors]
        for tensor in changed:
            tensor[:, :, 20:] = 3 * tensor[:, :, 20:].flip(2) + 1
        before = selective_attention(*tensors, enable_gqa=True)
        after = selective_attention(*changed, enable_gqa=True)
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert not torch.equal(before[:, :, 20:], after[:, :, 20:])

    @pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
    @pytest.mark.parametrize("pad", [1, 2, 5])
    def test_left_padding_changes_nothing(self, random_qkv, pad, additive):
        tensors = random_qkv(2, 4, 2, 21, 8)
        mask = torch.arange(21).reshape(1, 1, 1, 21) >= pad
        if additive:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
        out = selective_attention(*tensors, attn_mask=mask, enable_gqa=True)
        alone = selective_attention(*(tensor[:, :, pad:] for tensor in tensors), enable_gqa=True)
        torch.testing.assert_close(out[:, :, pad:], alone, **CLOSE)
        assert (out[:, :, :pad] == 0).all()
        grads = torch.autograd.grad(out.square().sum(), tensors)
        assert all((grad[:, :, :pad] == 0).all() and grad.isfinite().all() for grad in grads)

    def test_rows_of_a_batch_with_different_padding(self, random_qkv):
        tensors = random_qkv(3, 2, 2, 16, 8)
        pads = (0, 3, 7)
        mask = (torch.arange(16) >= torch.tensor(pads)[:, None]).reshape(3, 1, 1, 16)
        out = selective_attention(*tensors, attn_mask=mask)
        for row, pad in enumerate(pads):
            alone = selective_attention(*(tensor[row : row + 1, :, pad:] for tensor in tensors))
            torch.testing.assert_close(out[row : row + 1, :, pad:], alone, **CLOSE)

    def test_packed_documents_equal_separate_runs(self, random_qkv):
        tensors = random_qkv(2, 4, 2, 30, 8)
        ends = (7, 8, 19, 30)
        document = torch.bucketize(torch.arange(30), torch.tensor(ends), right=True)
        packed = selective_attention(
            *tensors, attn_mask=document[:, None] == document, enable_gqa=True, protect_first=True
        )
        for start, end in zip((0, *ends), ends, strict=False):
            alone = selective_attention(*(tensor[:, :, start:end] for tensor in tensors), enable_gqa=True)
            torch.testing.assert_close(packed[:, :, start:end], alone, **CLOSE)

    @pytest.mark.parametrize("window", [20, 21, 1000])
    def test_window_of_the_whole_length_is_no_window(self, random_qkv, window):
        tensors = random_qkv(1, 2, 2, 20, 8)
        assert torch.equal(selective_attention(*tensors, window=window), selective_attention(*tensors))

    def test_window_of_one_key_is_the_value(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 9, 4)
        torch.testing.assert_close(selective_attention(query, key, value, window=1), value, **CLOSE)

    def test_causal_mask_equals_is_causal(self, random_qkv):
        tensors = random_qkv(1, 2, 2, 20, 8)
        masked = selective_attention(*tensors, attn_mask=causal(20), is_causal=False)
        assert torch.equal(masked, selective_attention(*tensors))

    def test_logits_of_pairs_that_may_not_vote_are_ignored(self):
        source = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 12, 12, generator=source, dtype=torch.float64)
        seen = causal(12) & (torch.arange(12) >= torch.tensor([0, 3])[:, None, None])
        may_not = ~seen | torch.eye(12, dtype=torch.bool)
        may_not[0, :, 0] = may_not[1, :, 3] = True
        for other in (1e4, math.inf, math.nan):
            changed = logits.masked_fill(may_not, other)
            for ours, theirs in zip(selection_penalty(changed, seen), selection_penalty(logits, seen), strict=True):
                assert torch.equal(ours, theirs)

    def test_votes_come_from_raw_logits_and_leave_them_unchanged(self, random_qkv):
        query, key, _ = random_qkv(1, 2, 2, 12, 8)
        logits = attention_logits(query, key).detach()
        before = logits.clone()
        selection_penalty(logits[:, 0], causal(12))
        assert torch.equal(logits, before)

    def test_scaling_values_scales_the_output(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 20, 8)
        out = selective_attention(query, key, value)
        assert torch.equal(selective_attention(query, key, 4 * value), 4 * out)

    def test_all_heads_share_the_votes_of_the_selection_head(self, random_qkv):
        query, key, value = random_qkv(2, 4, 4, 20, 8)
        order = torch.tensor([2, 0, 1, 3])
        chosen = selective_attention(query, key, value, selection_head=2)
        moved = selective_attention(query[:, order], key[:, order], value[:, order])
        torch.testing.assert_close(chosen[:, order], moved, **CLOSE)
        assert (chosen - selective_attention(query, key, value)).abs().max() > 1e-3

    def test_one_kv_head_per_group_equals_repeated_kv(self, random_qkv):
        query, key, value = random_qkv(2, 6, 2, 20, 8)
        for head in (0, 5):
            grouped = selective_attention(query, key, value, enable_gqa=True, selection_head=head)
            repeated = [tensor.repeat_interleave(3, dim=1) for tensor in (key, value)]
            torch.testing.assert_close(grouped, selective_attention(query, *repeated, selection_head=head), **CLOSE)

    def test_query_without_keys_gives_zero_and_casts_no_vote(self, random_qkv):
        tensors = random_qkv(1, 2, 2, 10, 8)
        mask = causal(10)
        mask[4] = False
        out = selective_attention(*tensors, attn_mask=mask, is_causal=False)
        assert (out[:, :, 4] == 0).all()
        grads = torch.autograd.grad(out.sum(), tensors)
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, :, 4] == 0).all()
        louder = [tensor.detach().clone() for tensor in tensors]
        louder[0][:, :, 4] *= 100
        assert torch.equal(selective_attention(*louder, attn_mask=mask, is_causal=False), out)

    def test_rows_that_see_only_invisible_keys_make_no_nan_in_anomaly_mode(self, random_qkv):
        tensors = random_qkv(1, 1, 1, 6, 4)
        mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~causal(6), -math.inf)
        mask[2] = -math.inf
        mask.requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True):
            out = selective_attention(*tensors, attn_mask=mask, is_causal=False)
            out.square().sum().backward()
        assert mask.grad.isfinite().all()

    def test_bias_is_part_of_the_vote(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 10, 8)
        low = torch.zeros(2, 10, 10, dtype=torch.float64)
        low[0] = -100.0  # shifts every logit of head 0 alike: its softmax stays, its votes go
        out = selective_attention(query, key, value, attn_mask=low)
        plain = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(out, plain, rtol=1e-11, atol=1e-12)

    def test_bias_per_head_is_added_after_the_soft_cap(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 10, 8)
        slope = -torch.tensor([0.5, 0.25], dtype=torch.float64).reshape(2, 1, 1)
        bias = slope * (torch.arange(10)[:, None] - torch.arange(10)).abs()
        logits = 2.0 * torch.tanh(query @ key.mT / math.sqrt(8) / 2.0) + bias
        penalty, _ = selection_penalty(logits[:, 0], causal(10))
        expected = masked_softmax(logits - penalty[:, None], causal(10)) @ value
        out = selective_attention(query, key, value, attn_mask=bias, softcap=2.0)
        torch.testing.assert_close(out, expected, **CLOSE)

    def test_dropout_keeps_the_mean(self, random_qkv):
        tensors = [tensor.detach().expand(2000, -1, -1, -1) for tensor in random_qkv(1, 1, 1, 5, 2)]
        torch.manual_seed(0)
        dropped = selective_attention(*tensors, dropout_p=0.25)
        whole = selective_attention(*tensors)
        assert not torch.equal(dropped, whole)
        torch.testing.assert_close(dropped.mean(0), whole[0], rtol=0, atol=0.1)
        assert (selective_attention(*tensors, dropout_p=1.0) == 0).all()


class TestShapes:
    @settings(max_examples=40, deadline=None)
    @given(shape=shapes())
    def test_equals_the_definition_pair_by_pair(self, shape):
        source = torch.Generator().manual_seed(shape.seed)
        L, pad = shape.L, min(shape.pad, shape.L - 1)
        query, key, value = (
            torch.randn(1, heads, L, D, generator=source, dtype=torch.float64)
            for heads, D in ((shape.H, shape.D), (shape.Hkv, shape.D), (shape.Hkv, shape.Dv))
        )
        real = torch.arange(L) >= pad
        seen = causal(L) & real
        if shape.window is not None:
            seen &= torch.arange(L)[:, None] - torch.arange(L) < shape.window
        out = selective_attention(query, key, value, attn_mask=real, enable_gqa=True, window=shape.window)
        torch.testing.assert_close(out, dense_formula(query, key, value, seen=seen, protect=pad), **CLOSE)

    @pytest.mark.parametrize("L", [1, 2, 3, 63, 111])
    def test_odd_lengths(self, random_qkv, L):
        tensors = random_qkv(1, 2, 1, L, 16, Dv=5)
        out = selective_attention(*tensors, enable_gqa=True)
        assert out.shape == (1, 2, L, 5)
        torch.testing.assert_close(out, dense_formula(*(tensor.detach() for tensor in tensors)), **CLOSE)

    def test_sparse_votes(self, sparse_votes):
        tensors = sparse_votes(1, 2, 2, 111, 16)
        found = parts(*tensors[:2], causal(111))
        voting = (found.logits[0, 0] > 0) & causal(111).tril(-1)
        assert 0.005 < voting.sum() / causal(111).tril(-1).sum() < 0.05
        out = selective_attention(*tensors)
        torch.testing.assert_close(out, dense_formula(*(tensor.detach() for tensor in tensors)), **CLOSE)

    def test_strided_inputs(self, random_qkv):
        tensors = random_qkv(2, 3, 3, 17, 8)
        strided = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        assert not any(tensor.is_contiguous() for tensor in strided)
        torch.testing.assert_close(selective_attention(*strided), selective_attention(*tensors), **CLOSE)

    def test_queries_of_another_order_without_a_causal_mask(self, random_qkv):
        query, key, value = (tensor.detach() for tensor in random_qkv(1, 2, 2, 9, 4))
        out = selective_attention(query, key, value, is_causal=False)
        everything = torch.ones(9, 9, dtype=torch.bool)
        torch.testing.assert_close(out, dense_formula(query, key, value, seen=everything), **CLOSE)


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("inputs", ["random_qkv", "sparse_votes"])
    def test_no_worse_than_ordinary_pytorch(self, request, assert_no_worse, inputs, dtype):
        for seed in range(3):
            tensors = request.getfixturevalue(inputs)(2, 4, 4, 111, 32, dtype=dtype, seed=seed)
            exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
            exact = selective_attention(*exact_tensors)
            ours, ordinary = selective_attention(*tensors), ordinary_selective(*tensors)
            assert ours.dtype == dtype
            assert_no_worse(ours, ordinary, exact, "output")
            upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            grads = zip(
                torch.autograd.grad(ours, tensors, upstream),
                torch.autograd.grad(ordinary, tensors, upstream),
                torch.autograd.grad(exact, exact_tensors, upstream.double()),
                strict=True,
            )
            for name, trio in zip(("dq", "dk", "dv"), grads, strict=True):
                assert_no_worse(*trio, name)

    def test_votes_are_summed_in_float32(self):
        logits = torch.full((1, 4096, 4096), 0.01, dtype=torch.float32)
        penalty, state = selection_penalty(logits, causal(4096))
        assert penalty.dtype == state.dtype == torch.float32
        torch.testing.assert_close(state[0, 1].item(), 0.01 * 4094, rtol=1e-5, atol=0)

    def test_autocast_does_not_reach_the_votes(self, sparse_votes):
        tensors = sparse_votes(1, 2, 2, 40, 16, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            under = selective_attention(*tensors)
        assert torch.equal(under, selective_attention(*tensors))

    def test_autocast_takes_mixed_inputs(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 12, 8, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = selective_attention(query, key, value.bfloat16())
        expected = selective_attention(query, key, value.bfloat16().float())
        torch.testing.assert_close(out, expected)
