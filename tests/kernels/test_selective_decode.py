"""Selective attention step by step equals selective attention of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrewrite.functional import SelectionState, selective_attention, selective_decode
from attnrewrite.kernels import strips
from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.selective.step import step

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def draw(B, H, Hkv, L, D=4, seed=0):
    source = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, h, L, D, generator=source, dtype=torch.float64) for h in (H, Hkv, Hkv))


def stepwise(query, key, value, cuts, mask=None, **options):
    """Feed the tokens in pieces that end at ``cuts``; a mask is [B or 1, 1 or H, L, L]."""
    state, out, start = None, [], 0
    for stop in (*cuts, query.shape[2]):
        part = None if mask is None else mask[:, :, start:stop, :stop]
        piece, state = selective_decode(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], state, part, enable_gqa=True, **options
        )
        out.append(piece)
        start = stop
    return torch.cat(out, 2), state


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_equals_the_whole(data):
    ask = data.draw
    Hkv, L = ask(st.integers(1, 2)), ask(st.integers(1, 12))
    H = Hkv * ask(st.integers(1, 2))
    cuts = sorted(ask(st.sets(st.integers(1, L - 1)))) if L > 1 else []
    options = {
        "window": ask(st.none() | st.integers(1, 13)),
        "softcap": ask(st.sampled_from([None, 2.0])),
        "selection_head": ask(st.integers(0, H - 1)),
        "gamma": ask(st.sampled_from([1.0, 0.5, 0.0])),
        "protect_first": ask(st.booleans()),
    }
    given_ = draw(2, H, Hkv, L, seed=ask(st.integers(0, 99)))
    kind = ask(st.sampled_from(["none", "left padding", "documents", "bias"]))
    mask = {
        "none": None,
        "left padding": (torch.arange(L) >= torch.tensor([[0], [ask(st.integers(0, L - 1))]]))[:, None, None].expand(
            -1, -1, L, -1
        ),
        "documents": (lambda d: (d[:, None] == d)[None, None])(torch.arange(L) // 4),
        "bias": torch.randn(1, H, L, L, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    }[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "BUDGET", ask(st.sampled_from([20, 1 << 22])))
        out, state = stepwise(*given_, cuts, mask, **options)
    whole = selective_attention(*given_, mask, enable_gqa=True, **options)
    torch.testing.assert_close(out, whole, **CLOSE)
    assert state.votes.shape == state.protected.shape == (2, L)


def test_low_precision_keeps_the_votes_in_float32():
    query, key, value = (x.bfloat16() for x in draw(1, 2, 2, 9))
    out, state = stepwise(query, key, value, (3, 4))
    assert out.dtype == torch.bfloat16 and state.votes.dtype == torch.float32
    assert torch.equal(out, selective_attention(query, key, value))


def test_dropped_keys_and_reordered_beams():
    """A cache without some keys goes on as if those had been invisible from then on."""
    query, key, value = draw(2, 2, 2, 9)
    _, state = selective_decode(query[:, :, :8], key[:, :, :8], value[:, :, :8])
    kept = torch.tensor([[0, 2, 3, 6, 7], [0, 1, 4, 5, 7]])
    pick = kept[:, None, :, None].expand(-1, 2, -1, 4)
    shorter = [torch.cat((x[:, :, :8].gather(2, pick), x[:, :, 8:]), 2) for x in (key, value)]
    pruned, _ = selective_decode(query[:, :, 8:], *shorter, state.kept(kept))
    seen = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    seen.view(2, 9).scatter_(1, torch.cat((kept, torch.full((2, 1), 8)), 1), True)
    hidden, _ = selective_decode(query[:, :, 8:], key, value, state, seen)
    torch.testing.assert_close(pruned, hidden, **CLOSE)
    beams = torch.tensor([1, 0])
    turned, _ = selective_decode(query[beams, :, 8:], key[beams], value[beams], state.reordered(beams))
    straight, _ = selective_decode(query[:, :, 8:], key, value, state)
    assert torch.equal(turned, straight[beams])


def test_the_caller_keeps_the_state_of_the_step_before():
    query, key, value = draw(1, 2, 2, 6)
    _, state = selective_decode(query[:, :, :5], key[:, :, :5], value[:, :, :5])
    before = state.votes.clone()
    selective_decode(query[:, :, 5:], key, value, state)
    assert torch.equal(state.votes, before)


@pytest.mark.parametrize(
    ("rows", "keys", "state", "said"),
    [
        (slice(4, 6), 6, None, "no state"),
        (slice(4, 6), 6, (1, 3), "needed is B x"),
        (slice(0, 6), 4, None, "newest"),
    ],
)
def test_bad_arguments(rows, keys, state, said):
    query, key, value = draw(1, 2, 2, 6)
    held = None if state is None else SelectionState(torch.zeros(state), torch.zeros(state, dtype=torch.bool))
    with pytest.raises(LoweringError, match=said) as failure:
        selective_decode(query[:, :, rows], key[:, :, :keys], value[:, :, :keys], held)
    assert failure.value.code == "AR402"


def test_a_cache_of_fixed_size_gives_the_same():
    """Keys behind the newest are there and hidden; where the queries stand is a number in a tensor."""
    query, key, value = draw(2, 2, 2, 9)
    options = (torch.tensor(1.0), torch.zeros(2, 12), torch.zeros(2, 12, dtype=torch.bool))
    room = [torch.cat((x, torch.full((2, 2, 3, 4), 7.0)), 2) for x in (key, value)]
    seen = torch.arange(12) <= torch.arange(9)[:, None]
    gamma, votes, protected = options
    found = []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        out, received, protected = step(
            query[:, :, start:stop],
            *room,
            gamma,
            votes,
            protected,
            seen[start:stop],
            torch.tensor(start),
            None,
            None,
            0.5,
            0.0,
            None,
            None,
            0,
            True,
        )
        votes = received[:, -1]
        found.append(out)
    whole, state = selective_decode(query, key, value)
    torch.testing.assert_close(torch.cat(found, 2), whole, **CLOSE)
    torch.testing.assert_close(votes[:, :9], state.votes, **CLOSE)
    assert torch.equal(protected[:, :9], state.protected) and not votes[:, 9:].any()


@pytest.mark.parametrize("budget", [30, 1 << 22])
def test_gradients_through_the_votes_of_earlier_steps(budget, monkeypatch):
    """Step by step, with the gradient through the state, the gradients are those of the whole, and of differences."""
    monkeypatch.setattr(strips, "BUDGET", budget)
    given_ = [x.requires_grad_() for x in draw(1, 2, 1, 7)]
    gamma = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps, _ = stepwise(*given_, (3, 4), gamma=gamma, softcap=3.0)
    whole = selective_attention(*given_, enable_gqa=True, gamma=gamma, softcap=3.0)
    for a, b in zip(*(torch.autograd.grad(x, (*given_, gamma), upstream) for x in (steps, whole)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)

    def votes(*tensors):
        return stepwise(*tensors, (3,))[1].votes

    assert torch.autograd.gradcheck(votes, tuple(given_))


@pytest.mark.parametrize("bias", [False, True])
def test_torchs_own_checks(bias):
    query, key, value = (x.requires_grad_() for x in draw(2, 2, 1, 6))
    votes = torch.rand(2, 6, dtype=torch.float64).index_fill(1, torch.tensor([4, 5]), 0.0).requires_grad_()
    mask = torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True) if bias else None
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    tensors = (query[:, :, 4:].detach().requires_grad_(), key, value, gamma, votes, torch.zeros(2, 6, dtype=torch.bool))
    torch.library.opcheck(
        torch.ops.attnrewrite.selective_decode.default, (*tensors, mask, None, None, None, 0.5, 0.0, None, 2.0, 1, True)
    )


@pytest.mark.parametrize("budget", [30, 1 << 22])
@pytest.mark.parametrize("window", [None, 3])
def test_votes_after_each_of_the_last_queries(budget, window, monkeypatch):
    """What is returned for a query is what the step returns that ends with it."""
    monkeypatch.setattr(strips, "BUDGET", budget)
    query, key, value = draw(2, 2, 1, 9)
    _, state = selective_decode(query[:, :, :4], key[:, :, :4], value[:, :, :4], enable_gqa=True, window=window)
    votes, protected = (torch.nn.functional.pad(x, (0, 5)) for x in (state.votes, state.protected))
    given_ = (torch.tensor(1.0), votes, protected, None, None, None, None, 0.5, 0.0, window, None, 0, True)
    for recent in (1, 3, 5):
        _, received, _ = step(query[:, :, 4:], key, value, *given_, recent=recent)
        assert received.shape == (2, recent, 9)
        for row, stop in enumerate(range(10 - recent, 10)):
            tokens = (query[:, :, 4:stop], key[:, :, :stop], value[:, :, :stop])
            _, then = selective_decode(*tokens, state, enable_gqa=True, window=window)
            torch.testing.assert_close(received[:, row, :stop], then.votes, **CLOSE)
            assert not received[:, row, stop:].any()
