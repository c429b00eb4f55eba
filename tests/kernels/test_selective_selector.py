"""Votes of a selector: queries and keys of their own in the place of a head's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_support import CLOSE
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.functional import selective_attention, selective_decode
from attnrewrite.kernels import strips
from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.selective import reference
from attnrewrite.kernels.selective.decomposition import selective_attention as decomposed

DS = 3


def draw(B, H, Hkv, L, D=4, seed=0, dtype=torch.float64):
    """Query, key, value, and the queries and keys of a selector."""
    source = torch.Generator().manual_seed(seed)
    shapes = [(B, H, L, D), (B, Hkv, L, D), (B, Hkv, L, D), (B, L, DS), (B, L, DS)]
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(attend, query, key, value, vote_query, vote_key, **options):
    return attend(query, key, value, enable_gqa=True, vote_query=vote_query, vote_key=vote_key, **options)


def masks(L):
    return {
        "none": None,
        "left padding": (torch.arange(L) >= torch.tensor([[0], [L // 3]]))[:, None, None],
        "documents": (lambda d: (d[:, None] == d)[None, None])(torch.arange(L) // 4),
        "bias": torch.randn(1, 2, L, L, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    }


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_strips_equal_the_reference_and_steps_the_whole(data):
    ask = data.draw
    Hkv, L = ask(st.integers(1, 2)), ask(st.integers(1, 12))
    mask = masks(L)[ask(st.sampled_from(["none", "left padding", "documents", "bias"]))]
    H = 2 if mask is not None and mask.dim() == 4 and mask.shape[1] == 2 else Hkv * ask(st.integers(1, 2))
    tensors = draw(2, H, Hkv, L, seed=ask(st.integers(0, 99)))
    options = {
        "window": ask(st.none() | st.integers(1, 13)),
        "softcap": ask(st.sampled_from([None, 2.0])),
        "gamma": ask(st.sampled_from([1.0, 0.5])),
        "protect_first": ask(st.booleans()),
    }
    expected = run(reference.selective_attention, *tensors, attn_mask=mask, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "BUDGET", ask(st.sampled_from([20, 1 << 22])))
        torch.testing.assert_close(run(selective_attention, *tensors, attn_mask=mask, **options), expected, **CLOSE)
        cut = ask(st.integers(1, L))
        state, found = None, []
        for start, stop in ((0, cut), (cut, L)):
            if start == stop:
                continue
            query, key, value, vote_query, vote_key = tensors
            part = None if mask is None else mask.expand(-1, -1, L, -1)[:, :, start:stop, :stop]
            held = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
            votes = {"vote_query": vote_query[:, start:stop], "vote_key": vote_key[:, :stop]}
            out, state = selective_decode(*held, state, part, enable_gqa=True, **votes, **options)
            found.append(out)
    torch.testing.assert_close(torch.cat(found, 2), expected, **CLOSE)


def test_the_head_itself_as_selector_is_the_head():
    query, key, value, *_ = draw(2, 4, 2, 11)
    own = {"vote_query": query[:, 3], "vote_key": key[:, 1]}
    for selected in (selective_attention, reference.selective_attention):
        found = selected(query, key, value, enable_gqa=True, **own)
        torch.testing.assert_close(found, selected(query, key, value, enable_gqa=True, selection_head=3), **CLOSE)


def test_votes_are_on_the_selectors_pairs_only():
    """Neither soft cap nor bias nor a head's logits are in a selector's votes: without votes it is plain attention."""
    query, key, value, vote_query, vote_key = draw(1, 2, 1, 9)
    silent = -vote_query.abs(), vote_key.abs()  # all logits below 0
    for options in ({}, {"softcap": 2.0}, {"attn_mask": masks(9)["bias"]}):
        plain = run(selective_attention, query, key, value, None, None, gamma=0.0, **options)
        assert torch.equal(run(selective_attention, query, key, value, *silent, **options), plain)
        assert not torch.allclose(run(selective_attention, query, key, value, vote_query, vote_key, **options), plain)


@pytest.mark.parametrize("budget", [30, 1 << 22])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3, "softcap": 2.0}, {"attn_mask": torch.arange(6) >= 2, "protect_first": False}],
    ids=["causal", "window", "left_padded"],
)
def test_gradients_against_differences(options, budget, monkeypatch):
    monkeypatch.setattr(strips, "BUDGET", budget)
    gamma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    tensors = draw(2, 2, 1, 6)
    assert torch.autograd.gradcheck(
        lambda gamma, *x: run(selective_attention, *x, gamma=gamma, **options), (gamma, *tensors)
    )


def test_gradients_through_steps_are_those_of_the_whole():
    tensors = draw(1, 2, 1, 7)
    query, key, value, vote_query, vote_key = tensors
    state, found = None, []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        votes = {"vote_query": vote_query[:, start:stop], "vote_key": vote_key[:, :stop]}
        held = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
        out, state = selective_decode(*held, state, enable_gqa=True, **votes)
        found.append(out)
    upstream = torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    both = (torch.cat(found, 2), run(selective_attention, *tensors))
    for a, b in zip(*(torch.autograd.grad(x, tensors, upstream) for x in both), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_budget_takes_the_selectors_votes():
    query, key, value, vote_query, vote_key = (x.detach() for x in draw(1, 2, 2, 12))
    votes = {"vote_query": vote_query, "vote_key": vote_key}
    _, state = selective_decode(query, key, value, budget=5, **votes)
    assert int(state.votes.isfinite().sum()) == 5
    whole, _ = selective_decode(query, key, value, budget=12, **votes)
    torch.testing.assert_close(whole, selective_attention(query, key, value, **votes), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_come_in_the_dtype_of_the_tensors(dtype):
    query, key, value = draw(1, 2, 2, 9, dtype=dtype)[:3]
    votes = draw(1, 2, 2, 9, dtype=torch.float32)[3:]
    run(selective_attention, query, key, value, *votes).float().square().sum().backward()
    assert query.grad.dtype == dtype
    assert all(x.grad.dtype == torch.float32 and x.grad.abs().max() > 0 for x in votes)


@pytest.mark.parametrize("bias", [False, True])
def test_torchs_own_checks(bias):
    query, key, value, *votes = draw(2, 2, 1, 6)
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True) if bias else None
    numbers = (0.5, 0.0, True, None, 2.0, 1, True)
    whole = torch.ops.attnrewrite.selective_attention.default
    torch.library.opcheck(whole, (query, key, value, gamma, mask, None, *numbers, *votes))
    state = (torch.rand(2, 6, dtype=torch.float64).requires_grad_(), torch.zeros(2, 6, dtype=torch.bool))
    part = None if mask is None else mask[:, :, 4:].detach().requires_grad_()
    last = (query[:, :, 4:].detach().requires_grad_(), key, value, gamma, *state, part, None, None, None)
    numbers = (0.5, 0.0, None, 2.0, 1, True)
    step = torch.ops.attnrewrite.selective_decode.default
    torch.library.opcheck(step, (*last, *numbers, votes[0][:, 4:].detach().requires_grad_(), votes[1]))


def test_the_decomposition_is_the_operator():
    query, key, value, *votes = draw(2, 4, 2, 7)
    for mask in (None, (torch.arange(7) >= torch.tensor([[0], [2]]))[:, None, None]):
        given_ = (query, key, value, torch.tensor(0.7, dtype=torch.float64), mask, None)
        numbers = (0.5, 0.0, True, None, 2.0, 1, True)
        found = torch.ops.attnrewrite.selective_attention(*given_, *numbers, *votes)
        torch.testing.assert_close(decomposed(*given_, *numbers, *votes), found, **CLOSE)


def test_flops_of_the_selector_are_counted():
    tensors = draw(2, 4, 2, 7)
    counts = []
    for votes in (tensors[3:], (None, None)):
        with FlopCounterMode(display=False) as counter:
            out = run(selective_attention, *tensors[:3], *votes)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    pairs = 2 * 2 * 7 * 7
    assert counts[0][0] - counts[1][0] == pairs * DS
    assert counts[0][1] - counts[1][1] == pairs * (4 * DS - 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vote_key": None}, "missing"),
        ({"vote_query": torch.zeros(1, 5, 3)}, "vote_query is 1 x 5 x 3"),
        ({"vote_key": torch.zeros(1, 6, 4)}, "vote_key is 1 x 6 x 4"),
        ({"vote_key": torch.zeros(1, 6, 3, dtype=torch.long)}, "int64"),
    ],
)
def test_bad_arguments(change, said):
    query, key, value, vote_query, vote_key = draw(1, 2, 2, 6, dtype=torch.float32)
    votes = {"vote_query": vote_query, "vote_key": vote_key} | change
    for attend in (selective_attention, selective_decode, reference.selective_attention):
        with pytest.raises(LoweringError, match=said) as failure:
            attend(query, key, value, **votes)
        assert failure.value.code == "AR402"
