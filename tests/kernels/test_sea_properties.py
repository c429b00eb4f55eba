"""Properties of the sea reference: shapes against the definition, padding, empty sets."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sea_support import CLOSE, attended, chosen, draw_tensors, run, selected_sets, visible_keys

from attnrewrite.kernels.sea import selection
from attnrewrite.kernels.sea.reference import sea_attention
from attnrewrite.kernels.sea.slices import Rule


@st.composite
def cases(draw):
    Hkv, L = draw(st.integers(1, 2)), draw(st.integers(1, 14))
    is_causal = draw(st.booleans())
    return SimpleNamespace(
        Hkv=Hkv,
        H=Hkv * draw(st.integers(1, 2)),
        L=L,
        M=draw(st.integers(1, 9)),
        D=draw(st.integers(1, 5)),
        Dv=draw(st.integers(1, 5)),
        is_causal=is_causal,
        window=draw(st.none() | st.integers(1, 15)) if is_causal else None,
        real=draw(st.lists(st.booleans(), min_size=L, max_size=L)),
        budget=draw(st.integers(1, 16)),
        rule=draw(st.sampled_from(["exact", "paper"])),
        grouping=draw(st.sampled_from(["causal_per_batch", "per_query"])),
        seed=draw(st.integers(0, 2**16)),
    )


def cut(tensors, part):
    return [tensor.detach()[:, :, part].requires_grad_() for tensor in tensors]


def grads_of(out, tensors):
    found = torch.autograd.grad(out.square().sum(), tensors, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(found, tensors, strict=True)]


class TestShapes:
    @settings(max_examples=60, deadline=None)
    @given(case=cases())
    def test_equals_the_definition_slice_by_slice(self, case):
        query, key, value, estimated, *_ = (
            t.detach() for t in draw_tensors(1, case.H, case.Hkv, case.L, case.D, case.M, Dv=case.Dv, seed=case.seed)
        )
        seen = visible_keys(case.L, is_causal=case.is_causal, window=case.window, real=case.real)
        sets = chosen(estimated[0], seen, budget=case.budget, rule=case.rule, grouping=case.grouping)
        real = torch.tensor(case.real)
        visibility = {"is_causal": case.is_causal, "window": case.window}
        rule = Rule(case.budget, case.rule, case.grouping)
        assert selected_sets(estimated, rule, padding=real[None], **visibility) == sets
        out = sea_attention(
            query,
            key,
            value,
            estimated,
            real,
            enable_gqa=True,
            budget=case.budget,
            budget_rule=case.rule,
            grouping=case.grouping,
            strict_window=False,
            **visibility,
        )
        torch.testing.assert_close(out[0], attended(query[0], key[0], value[0], sets), **CLOSE)

    @settings(max_examples=25, deadline=None)
    @given(case=cases())
    def test_without_a_mask_equals_a_mask_of_ones(self, case):
        tensors = draw_tensors(2, case.H, case.Hkv, case.L, case.D, case.M, Dv=case.Dv, seed=case.seed)
        options = {
            "is_causal": case.is_causal,
            "window": case.window,
            "strict_window": False,
            "budget": case.budget,
            "budget_rule": case.rule,
            "grouping": case.grouping,
        }
        masked = run(tensors, attn_mask=torch.ones(case.L, dtype=torch.bool), **options)
        torch.testing.assert_close(run(tensors, **options), masked, **CLOSE)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("grouping", ["causal_per_batch", "per_query"])
    def test_number_of_queries_at_a_time_changes_nothing(self, monkeypatch, is_causal, grouping):
        tensors = draw_tensors(2, 4, 2, 33, 4, 5)
        whole = run(tensors, is_causal=is_causal, grouping=grouping)
        for size in (1, 3000):
            monkeypatch.setattr(selection, "_CHUNK", size)
            torch.testing.assert_close(run(tensors, is_causal=is_causal, grouping=grouping), whole, **CLOSE)

    def test_grouped_heads_equal_repeated_kv(self):
        tensors = draw_tensors(2, 6, 2, 12, 4, 5)
        repeated = [t.repeat_interleave(3, dim=1) if i in (1, 2) else t for i, t in enumerate(tensors)]
        torch.testing.assert_close(run(tensors), run(repeated), **CLOSE)

    def test_strided_inputs(self):
        tensors = draw_tensors(2, 3, 3, 9, 4, 5)
        strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
        assert torch.equal(run(strided), run(tensors))

    def test_window_of_the_whole_length_is_no_window(self):
        tensors = draw_tensors(1, 2, 2, 9, 4, 5)
        for window in (9, 50):
            torch.testing.assert_close(run(tensors, window=window, strict_window=False), run(tensors), **CLOSE)

    def test_window_pools_the_window(self):
        *tensors, _ = draw_tensors(1, 2, 2, 9, 4, 5)
        out = run([*tensors, torch.zeros(1, 1, 1).double()], window=3, strict_window=False)
        for i in range(9):
            mean = tensors[2][:, :, max(0, i - 2) : i + 1].mean(2)
            torch.testing.assert_close(out[:, :, i], mean, **CLOSE)

    def test_factors_broadcast(self):
        tensors = draw_tensors(2, 3, 3, 7, 4, 5)
        narrow = [*tensors[:4], tensors[4][:1, :, :1], tensors[5][:, :1]]
        wide = [*tensors[:4], narrow[4].expand(2, 3, 7), narrow[5].expand(2, 3, 7)]
        assert torch.equal(run(narrow), run(wide))


class TestVisibility:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_no_leak_from_the_future(self, dtype):
        tensors = [t.detach() for t in draw_tensors(2, 4, 2, 33, 4, 5, dtype=dtype)]
        changed = [t.clone() for t in tensors]
        for t in changed:
            t[:, :, 20:] = 3 * t[:, :, 20:].flip(2) + 1
        before, after = run(tensors), run(changed)
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert not torch.equal(before[:, :, 20:], after[:, :, 20:])

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
    @pytest.mark.parametrize("real", [slice(3, None), slice(None, 9), slice(0, 0), slice(4, 5)], ids=str)
    def test_padding_changes_nothing(self, is_causal, additive, real):
        tensors = draw_tensors(2, 4, 2, 12, 4, 5)
        mask = torch.zeros(12, dtype=torch.bool)
        mask[real] = True
        given_mask = torch.zeros(12).double().masked_fill(~mask, -math.inf) if additive else mask
        out = run(tensors, attn_mask=given_mask.reshape(1, 1, 1, 12), is_causal=is_causal)
        assert (out[:, :, ~mask] == 0).all()
        grads = grads_of(out, tensors)
        assert all(grad.isfinite().all() and (grad[:, :, ~mask] == 0).all() for grad in grads)
        if mask.any():
            alone = cut(tensors, real)
            torch.testing.assert_close(out[:, :, real], run(alone, is_causal=is_causal), **CLOSE)
            for grad, other in zip(grads, grads_of(run(alone, is_causal=is_causal), alone), strict=True):
                torch.testing.assert_close(grad[:, :, real], other, **CLOSE)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_padding_beside_a_bias(self, is_causal):
        tensors = draw_tensors(2, 4, 2, 12, 4, 5)
        bias = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        real = torch.arange(12)[None] >= 3
        out = run(tensors, attn_mask=bias, padding=real, is_causal=is_causal)
        assert (out[:, :, :3] == 0).all()
        alone = run(cut(tensors, slice(3, None)), attn_mask=bias[:, 3:, 3:], is_causal=is_causal)
        torch.testing.assert_close(out[:, :, 3:], alone, **CLOSE)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_garbage_at_padding_stays_there(self, is_causal):
        tensors = draw_tensors(1, 2, 2, 12, 4, 5)
        mask = torch.arange(12) >= 4
        garbage = [t.detach().clone() for t in tensors]
        for t in garbage:
            t[:, :, :4] = math.nan
        garbage = [t.requires_grad_() for t in garbage]
        out = run(garbage, attn_mask=mask, is_causal=is_causal)
        assert torch.equal(out, run(tensors, attn_mask=mask, is_causal=is_causal))
        assert all(grad.isfinite().all() for grad in grads_of(out, garbage))

    def test_rows_of_a_batch_with_different_padding(self):
        tensors = draw_tensors(3, 2, 2, 10, 4, 4)
        pads = (0, 3, 7)
        mask = (torch.arange(10) >= torch.tensor(pads)[:, None]).reshape(3, 1, 1, 10)
        for is_causal in (True, False):
            out = run(tensors, attn_mask=mask, is_causal=is_causal)
            for row, pad in enumerate(pads):
                alone = run([t[row : row + 1, :, pad:] for t in tensors], is_causal=is_causal)
                torch.testing.assert_close(out[row : row + 1, :, pad:], alone, **CLOSE)

    @pytest.mark.parametrize("shape", [(2, 10, 10), (2, 1, 10), (1, 10, 10), (10,)])
    def test_bias_is_added_at_the_selected_pairs(self, shape):
        query, key, value, estimated, *_ = (t.detach() for t in draw_tensors(1, 2, 2, 10, 4, 4))
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out = sea_attention(query, key, value, estimated, bias, is_causal=True, budget=2)
        sets = chosen(estimated[0], visible_keys(10), budget=2)
        expected = attended(query[0], key[0], value[0], sets, bias=bias.expand(2, 10, 10))
        torch.testing.assert_close(out[0], expected, **CLOSE)

    def test_infinite_bias_takes_pairs_out_of_the_softmax_alone(self):
        query, key, value, estimated, *_ = draw_tensors(1, 2, 2, 10, 4, 4)
        bias = torch.zeros(10, 10).double()
        bias[:, 3] = -math.inf
        bias[7] = -math.inf
        bias.requires_grad_()
        out = sea_attention(query, key, value, estimated, bias, is_causal=True, budget=2)
        sets = [[keys - {3} for keys in head] for head in chosen(estimated[0], visible_keys(10), budget=2)]
        expected = attended(query[0], key[0], value[0], sets)
        expected[:, 7] = 0
        torch.testing.assert_close(out[0], expected, **CLOSE)
        grads = torch.autograd.grad(out.square().sum(), (query, key, value, bias))
        assert all(grad.isfinite().all() for grad in grads)


class TestEmptyAndBroken:
    def test_head_without_keys_is_exactly_zero(self):
        query, key, value, estimated, scale_prob, mix = draw_tensors(1, 2, 2, 12, 4, 4)
        low = estimated.detach().clone()
        low[:, 0, :, 0], low[:, 1] = 40.0, 0.0  # head 0 is certain, head 1 is flat
        low.requires_grad_()
        out = sea_attention(query, key, value, low, is_causal=True, budget=1, scale_prob=scale_prob)
        empty = [i for i, keys in enumerate(selected_sets(low, Rule(1), is_causal=True)[1]) if not keys]
        assert empty
        assert (out[:, 1, empty] == 0).all()
        grads = torch.autograd.grad(out.sum(), (query, key, value, scale_prob))
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, 1, empty] == 0).all()
        mixed = sea_attention(query, key, value, low, is_causal=True, budget=1, scale_prob=scale_prob, mix=mix)
        mean = value.cumsum(2) / torch.arange(1, 13)[:, None]
        torch.testing.assert_close(mixed[:, 1, empty], ((1 - mix)[..., None] * mean)[:, 1, empty], **CLOSE)

    @pytest.mark.parametrize("position", [0, 5])
    @pytest.mark.parametrize("at", [1, 2], ids=["key", "value"])
    def test_nan_reaches_the_rows_that_select_it_and_no_other(self, at, position):
        tensors = [t.detach().clone() for t in draw_tensors(1, 2, 2, 12, 4, 4)]
        sets = selected_sets(tensors[3], Rule(2), is_causal=True)
        tensors[at][0, :, position] = math.nan
        out = sea_attention(*tensors[:4], is_causal=True, budget=2)
        for h in range(2):
            assert [bool(row.isnan().any()) for row in out[0, h]] == [position in keys for keys in sets[h]]

    def test_large_logits(self):
        query, key, value, estimated, *_ = (t.detach() for t in draw_tensors(1, 2, 2, 12, 4, 4))
        sets = chosen(estimated[0], visible_keys(12), budget=3)
        for scale in (1e4, -1e4):
            out = sea_attention(query, key, value, estimated, is_causal=True, budget=3, scale=scale)
            torch.testing.assert_close(out[0], attended(query[0], key[0], value[0], sets, scale=scale), **CLOSE)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("grouping", ["causal_per_batch", "per_query"])
    def test_estimate_that_is_no_distribution_makes_its_row_nan(self, bad, grouping):
        tensors = [t.detach() for t in draw_tensors(1, 2, 2, 12, 4, 4)]
        tensors[3][0, 1, 6, 2] = bad
        out = run(tensors, grouping=grouping)
        rows = out.isnan().any(-1)[0]
        assert rows[:, 6].tolist() == [grouping == "causal_per_batch", True]
        assert rows.sum() == rows[:, 6].sum()

    def test_selection_passes_no_gradient(self):
        tensors = draw_tensors(1, 2, 2, 12, 4, 4)
        assert torch.autograd.grad(run(tensors).sum(), tensors[3], allow_unused=True)[0] is None
        sparse = sea_attention(*tensors[:4], budget=2)
        assert torch.autograd.grad(sparse.sum(), tensors[3], allow_unused=True)[0] is None
        assert torch.autograd.grad(run(tensors, is_causal=False).sum(), tensors[3])[0].abs().max() > 1e-4

    def test_dropout_keeps_the_mean(self):
        tensors = [t.detach().expand(2000, -1, -1, -1) for t in draw_tensors(1, 1, 1, 5, 2, 2)[:4]]
        torch.manual_seed(0)
        dropped = sea_attention(*tensors, dropout_p=0.25, budget=2)
        whole = sea_attention(*tensors, budget=2)
        assert not torch.equal(dropped, whole)
        torch.testing.assert_close(dropped.mean(0), whole[0], rtol=0, atol=0.1)
        assert (sea_attention(*tensors, dropout_p=1.0, budget=2) == 0).all()
