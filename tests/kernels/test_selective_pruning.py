"""A bounded cache: which keys are evicted, and when."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrewrite.functional import selective_attention, selective_decode
from attnrewrite.kernels import strips
from attnrewrite.kernels.diagnostics import LoweringError

N, D, H = 64, 16, 4


def waves():
    """Query, key, value and the weights of the loss, by formula, with logits whose votes are sparse."""
    h, i, d = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (H, N, D)), indexing="ij")
    query = 0.5 * torch.sin(0.37 * i + 0.91 * d + 1.7 * h)
    key = 0.5 * torch.cos(0.53 * i - 0.67 * d + 0.9 * h)
    value = torch.sin(0.11 * i * (d + 1) + 0.3 * h)
    return (x.unsqueeze(0) for x in (query, key, value, torch.cos(0.23 * i + 0.41 * d - 0.5 * h)))


def stepwise(query, key, value, cuts, mask=None, *, budget):
    """Decode in pieces that end at ``cuts``; also return which keys live after each piece, a list of [B, S]."""
    state, out, live, start = None, [], [], 0
    for stop in (*cuts, query.shape[2]):
        part = None if mask is None else mask[:, :, :, :stop]
        piece = [query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]]
        step, state = selective_decode(*piece, state, part, budget=budget)
        out.append(step)
        live.append(~state.votes.isinf())
        start = stop
    return torch.cat(out, 2), live


# Evictions (after how many keys, which), the last live keys, the sum of the output and the loss.
PRUNED = {
    16: ([(16, 4), (17, 3), (18, 2), (19, 5), (20, 1), (21, 12)], {0, *range(48, 54), *range(55, 64)}, -35.3405624997),
    32: ([], {0, 29, *range(34, 64)}, -26.2084569191),
    8: ([(8, 5), (9, 6), (10, 4), (11, 7), (12, 3), (13, 2)], None, -45.0825762740),
    64: ([], set(range(64)), -26.3494418195),
}


@pytest.mark.parametrize("budget", PRUNED)
def test_evictions_by_hand(budget):
    query, key, value, weights = waves()
    out, live = stepwise(query, key, value, range(1, N), budget=budget)
    first, last, loss = PRUNED[budget]
    assert float((out * weights).sum()) == pytest.approx(loss, abs=1e-9)
    if budget == 16:
        assert float(out.sum()) == pytest.approx(370.9936320226, abs=1e-9)
    for t, gone in first:
        assert live[t - 1][0, gone] and not live[t][0, gone]
    if last is not None:
        assert set(live[-1][0].nonzero().flatten().tolist()) == last
    assert all(int(x.sum()) <= budget for x in live)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_cut_gives_the_same_and_dropped_keys_are_not_missed(data):
    ask = data.draw
    budget, pad = ask(st.integers(2, 13)), ask(st.integers(0, 4))
    source = torch.Generator().manual_seed(ask(st.integers(0, 99)))
    query, key, value = (torch.randn(2, 2, 12, 4, generator=source, dtype=torch.float64) - 0.3 for _ in range(3))
    mask = (torch.arange(12) >= torch.tensor([[0], [pad]]))[:, None, None]
    whole, last = stepwise(query, key, value, (), mask, budget=budget)
    cuts = sorted(ask(st.sets(st.integers(1, 11))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "BUDGET", ask(st.sampled_from([20, 1 << 22])))
        out, live = stepwise(query, key, value, cuts, mask, budget=budget)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-13)
    assert torch.equal(live[-1], last[-1])
    assert not last[-1][1, :pad].any() and last[-1][1, pad]  # padding never lives, the first real token always
    assert (last[-1].sum(-1) == torch.tensor([min(12, budget), min(12 - pad, budget)])).all()
    for earlier, later in itertools.pairwise(live):
        n = earlier.shape[1]
        assert not (later[:, :n] & ~earlier).any()
    if budget >= 12:
        assert torch.equal(whole, selective_attention(query, key, value, mask))


def test_a_cache_without_the_evicted_keys_goes_on_alike():
    source = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 10, 4, generator=source, dtype=torch.float64) for _ in range(3))
    _, state = selective_decode(query[:, :, :9], key[:, :, :9], value[:, :, :9], budget=4)
    whole, _ = selective_decode(query[:, :, 9:], key, value, state, budget=4)
    kept = (~state.votes.isinf()).nonzero()[:, 1].unsqueeze(0)
    assert kept.shape == (1, 4)
    here = torch.cat((kept[0], torch.tensor([9])))
    out, after = selective_decode(query[:, :, 9:], key[:, :, here], value[:, :, here], state.kept(kept), budget=4)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-13)
    assert int(after.votes.isinf().sum()) == 1


def test_a_vote_of_strength_zero_still_says_who_goes():
    """gamma = 0 takes nothing off, and infinite votes must not become NaN."""
    query, key, value, _ = waves()
    out, state = selective_decode(query, key, value, gamma=0.0, budget=8)
    assert out.isfinite().all()
    _, other = selective_decode(query, key, value, budget=8)
    assert torch.equal(state.votes, other.votes)


def test_wrong_budgets_and_gradients():
    query, key, value, _ = waves()
    for wrong in ({"budget": 1}, {"budget": 0}):
        with pytest.raises(LoweringError, match="budget is") as failure:
            selective_decode(query, key, value, **wrong)
        assert failure.value.code == "AR402"
    out, _ = selective_decode(query.requires_grad_(), key, value, budget=8)
    with pytest.raises(LoweringError, match="no gradient"):
        out.sum().backward()


def test_largest_penalty_goes_and_the_oldest_among_equals():
    """No votes at all: what is left is the first key and a sliding window."""
    query = -torch.ones(1, 1, 7, 2, dtype=torch.float64)
    key = value = -query
    _, live = stepwise(query, key, value, range(1, 7), budget=3)
    alive = [set(x[0].nonzero().flatten().tolist()) for x in live]
    assert alive == [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}, {0, 4, 5}, {0, 5, 6}]
    assert math.isclose(float(selective_decode(query, key, value, budget=3)[0][0, 0, 6, 0]), 1.0)


def row_by_row(query, key, value, bias, window, budget):
    """Prune and attend one query at a time: what is out of sight goes, then the key with the most votes."""
    logits = query @ key.mT * query.shape[-1] ** -0.5 + bias
    out, live, votes, first = [], [set() for _ in query], torch.zeros(query.shape[0], query.shape[2]).double(), 0
    for i in range(query.shape[2]):
        rows = []
        for b, held in enumerate(live):
            held.add(i)
            held -= {j for j in held if i - j >= window}
            may_go = sorted(held - {first, i})
            if len(held) > budget and may_go:
                held.remove(max(may_go, key=lambda j: (float(votes[b, j]), -j)))
            kept = sorted(held)
            weights = torch.softmax(logits[b, :, i, kept] - votes[b, kept], -1)  # [H, K]
            rows.append((weights.unsqueeze(-1) * value[b, :, kept]).sum(1))
            for j in range(max(0, i - window + 1), i):
                votes[b, j] += max(float(logits[b, 0, i, j]), 0.0) if j != first else 0.0
        out.append(torch.stack(rows))
    return torch.stack(out, 2), live


@pytest.mark.parametrize("scores", [20, 1 << 22])
@pytest.mark.parametrize(("window", "budget"), [(5, 3), (5, 5), (4, 9), (99, 4)])
def test_windows_and_biases(window, budget, scores, monkeypatch):
    """A key that leaves the window makes room; a bias says how far away a key is, and counts in the votes."""
    monkeypatch.setattr(strips, "BUDGET", scores)
    source = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 2, 12, 4, generator=source, dtype=torch.float64) for _ in range(3))
    place = torch.arange(12, dtype=torch.float64)
    bias = 0.3 * (place - place[:, None]).clamp(max=0) * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1).double()
    expected, last = row_by_row(query, key, value, bias, window, budget)
    for cuts in ((), (3, 7), range(1, 12)):
        state, out, start = None, [], 0
        for stop in (*cuts, 12):
            tokens = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
            part = bias[:, :, start:stop, :stop]
            piece, state = selective_decode(*tokens, state, part, window=window, budget=budget)
            out.append(piece)
            start = stop
        torch.testing.assert_close(torch.cat(out, 2), expected, rtol=1e-12, atol=1e-13)
        assert [set(x.nonzero().flatten().tolist()) for x in ~state.votes.isinf()] == last
