"""Decoding with sea: any way of cutting a sequence into calls gives what one call gives."""

import pytest
import torch
from sea_support import CLOSE, draw_estimator, draw_tensors

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.sea.decode import sea_decode
from attnrewrite.kernels.sea.estimator import causal_estimate
from attnrewrite.kernels.sea.reference import sea_attention

OPTIONS = {"budget": 3, "enable_gqa": True}


def whole(tensors, estimator, attn_mask=None, **options):
    padding = None if attn_mask is None else attn_mask[:, 0, 0]
    estimate, _ = causal_estimate(*tensors, estimator, padding)
    return sea_attention(
        *tensors,
        estimate.estimated,
        attn_mask,
        is_causal=True,
        scale_prob=estimate.scale_prob,
        mix=estimate.mix,
        **options,
    )


def in_steps(tensors, estimator, sizes, attn_mask=None, **options):
    query, key, value = tensors
    state, outs, start = None, [], 0
    for size in sizes:
        end = start + size
        mask = None if attn_mask is None else attn_mask[..., :end]
        out, state = sea_decode(
            query[:, :, start:end], key[:, :, :end], value[:, :, :end], estimator, state, mask, **options
        )
        outs.append(out)
        start = end
    return torch.cat(outs, dim=2), state


@pytest.mark.parametrize("sizes", [(21,), (1,) * 21, (10,) + (1,) * 11, (3, 7, 1, 2, 8)], ids=str)
@pytest.mark.parametrize("rule", ["exact", "paper"])
@pytest.mark.parametrize("grouping", ["causal_per_batch", "per_query"])
def test_any_cut_equals_the_whole(sizes, rule, grouping):
    estimator = draw_estimator(4, 6, 8, is_causal=True, Dv=5)
    tensors = [t.detach() for t in draw_tensors(2, 4, 2, 21, 6, 8, Dv=5)[:3]]
    options = OPTIONS | {"budget_rule": rule, "grouping": grouping}
    out, _ = in_steps(tensors, estimator, sizes, **options)
    torch.testing.assert_close(out, whole(tensors, estimator, **options), **CLOSE)


def test_cuts_within_and_beyond_a_chunk_of_the_running_sums():
    estimator = draw_estimator(2, 4, 8, is_causal=True, table=0)
    tensors = [t.detach() for t in draw_tensors(1, 2, 1, 150, 4, 8)[:3]]
    out, _ = in_steps(tensors, estimator, (70, 1, 64, 15), **OPTIONS)
    torch.testing.assert_close(out, whole(tensors, estimator, **OPTIONS), **CLOSE)


@pytest.mark.parametrize("table", [0, 64], ids=["fourier", "learned"])
def test_left_padding(table):
    estimator = draw_estimator(2, 4, 8, is_causal=True, table=table)
    tensors = [t.detach() for t in draw_tensors(2, 2, 2, 15, 4, 8)[:3]]
    mask = (torch.arange(15) >= torch.tensor([0, 6])[:, None]).reshape(2, 1, 1, 15)
    out, _ = in_steps(tensors, estimator, (4, 1, 8, 1, 1), mask, **OPTIONS)
    torch.testing.assert_close(out, whole(tensors, estimator, mask, **OPTIONS), **CLOSE)
    alone = whole([t[1:, :, 6:] for t in tensors], estimator, **OPTIONS)
    torch.testing.assert_close(out[1:, :, 6:], alone, **CLOSE)


@pytest.mark.parametrize("keys_only", [True, False])
def test_bias(keys_only):
    estimator = draw_estimator(2, 4, 8, is_causal=True)
    tensors = [t.detach() for t in draw_tensors(1, 2, 2, 9, 4, 8)[:3]]
    bias = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = bias[:, :1, :1] if keys_only else bias
    estimate, _ = causal_estimate(*tensors, estimator)
    factors = {"scale_prob": estimate.scale_prob, "mix": estimate.mix}
    expected = sea_attention(*tensors, estimate.estimated, bias, is_causal=True, **factors, **OPTIONS)
    state, start = None, 0
    for size in (4, 1, 3, 1):
        end = start + size
        rows = bias[..., :end] if keys_only else bias[:, :, start:end, :end]
        given = (tensors[0][:, :, start:end], *(t[:, :, :end] for t in tensors[1:]))
        out, state = sea_decode(*given, estimator, state, rows, **OPTIONS)
        torch.testing.assert_close(out, expected[:, :, start:end], **CLOSE)
        start = end


@pytest.mark.parametrize("window", [1, 4, 30])
def test_window(window):
    estimator = draw_estimator(2, 4, 8, is_causal=True)
    tensors = [t.detach() for t in draw_tensors(1, 2, 2, 15, 4, 8)[:3]]
    options = OPTIONS | {"window": window, "strict_window": False}
    out, _ = in_steps(tensors, estimator, (5, 1, 1, 6, 2), **options)
    torch.testing.assert_close(out, whole(tensors, estimator, **options), **CLOSE)


def test_state_is_the_same_and_does_not_grow():
    estimator = draw_estimator(2, 4, 8, is_causal=True)
    tensors = [t.detach() for t in draw_tensors(1, 2, 1, 33, 4, 8)[:3]]
    _, once = in_steps(tensors, estimator, (33,), **OPTIONS)
    _, often = in_steps(tensors, estimator, (1,) * 33, **OPTIONS)
    first = sea_decode(*(t[:, :, :1] for t in tensors), estimator, **OPTIONS)[1]
    for state in (once, often):
        assert state.estimator.length.tolist() == [33]
        torch.testing.assert_close(state.values, tensors[2].sum(2), **CLOSE)
    flat = [(*s.estimator.above, s.estimator.sums, s.values) for s in (once, often, first)]
    for a, b, c in zip(*flat, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        assert a.shape == c.shape


def test_running_sums_are_float32_for_16_bit_tensors():
    estimator = draw_estimator(2, 4, 8, is_causal=True, dtype=torch.bfloat16)
    tensors = [t.detach() for t in draw_tensors(1, 2, 2, 9, 4, 8, dtype=torch.bfloat16)[:3]]
    out, state = in_steps(tensors, estimator, (5, 1, 3), **OPTIONS)
    assert out.dtype == torch.bfloat16
    assert state.estimator.sums.dtype == state.values.dtype == torch.float32


def test_does_not_change_its_state():
    estimator = draw_estimator(2, 4, 8, is_causal=True)
    tensors = [t.detach() for t in draw_tensors(1, 2, 2, 6, 4, 8)[:3]]
    _, state = sea_decode(*(t[:, :, :5] for t in tensors), estimator, **OPTIONS)
    last = [tensors[0][:, :, 5:], *tensors[1:]]
    twice = [sea_decode(*last, estimator, state, **OPTIONS)[0] for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"T": 3}, ("3 of 5", "no state")),
        ({"T": 6}, ("6", "5")),
        ({"budget": 0}, ("0",)),
        ({"window": 3}, ("3", "strict_window")),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, ("5 queries", "1")),
        ({"kind": False}, ("bidirectional",)),
        ({"table": 4}, ("5 positions", "4")),
    ],
)
def test_wrong_arguments_say_both_sides(change, says):
    options = dict(change)
    T, kind, table = options.pop("T", 5), options.pop("kind", True), options.pop("table", 64)
    estimator = draw_estimator(2, 4, 8, is_causal=kind, table=table)
    query, key, value = torch.zeros(1, 2, T, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(LoweringError) as raised:
        sea_decode(query, key, value, estimator, **OPTIONS | options)
    assert raised.value.code == "AR402"
    assert all(part in raised.value.detail for part in says)


def test_a_state_for_a_whole_sequence_is_refused():
    estimator = draw_estimator(2, 4, 8, is_causal=True)
    tensors = [t.detach() for t in draw_tensors(1, 2, 2, 6, 4, 8)[:3]]
    _, state = sea_decode(*tensors, estimator, **OPTIONS)
    with pytest.raises(LoweringError, match="a state"):
        sea_decode(*tensors, estimator, state, **OPTIONS)
