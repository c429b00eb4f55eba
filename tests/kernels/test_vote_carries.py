"""Votes carried from one group of queries to the next: strips, ranks that share a sequence, keys that count no more."""

import dataclasses

import pytest
import torch

from attnrewrite.functional import selective_attention, selective_decode
from attnrewrite.kernels.dense import heights, launch, selective, tuned
from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.selective import Selection
from attnrewrite.kernels.strips import Options


def drawn(L, H=2, Hkv=1, D=16, B=1, strength=1.0):
    source = torch.Generator().manual_seed(0)
    shapes = {"query": (B, H, L, D), "key": (B, Hkv, L, D), "value": (B, Hkv, L, D)}
    tensors = {n: (torch.randn(shape, generator=source) * strength).requires_grad_() for n, shape in shapes.items()}
    return {**tensors, "gamma": torch.tensor(0.7, requires_grad=True)}


def above(L):
    """The gradient of the output: with others that by gamma may cancel to what rounding leaves."""
    return torch.randn(1, 2, L, 16, generator=torch.Generator().manual_seed(1))


def outputs(tensors, upstream):
    out = selective_attention(**tensors, enable_gqa=True)
    return [out, *torch.autograd.grad((out * upstream).sum(), list(tensors.values()))]


def close(found, true, tolerance=2e-6):
    for a, b in zip(found, true, strict=True):
        assert (a - b).norm() <= tolerance * max(1.0, b.norm())


def test_strips_change_nothing(monkeypatch):
    tensors, upstream = drawn(70), above(70)
    with kernels("triton"):
        whole = outputs(tensors, upstream)
        monkeypatch.setattr(heights, "LARGEST_PENALTY", 70 * 32 * 4)
        monkeypatch.setattr(heights, "STEP", 16)
        assert len(list(heights.strips_of(Call(*list(tensors.values())[:3], how=Options(0.25, True))))) == 3
        close(outputs(tensors, upstream), whole)


def test_two_ranks_with_half_of_the_queries_each():
    """What the first rank hands on is the votes; what the second hands back is the gradient by them."""
    tensors, upstream = drawn(96), above(96)
    q, k, v, gamma = tensors.values()
    half = slice(0, 48), slice(48, 96)
    with kernels("reference"):
        whole = outputs(tensors, upstream)
    with kernels("triton"):
        first, state = selective_decode(
            q[:, :, half[0]], k[:, :, half[0]], v[:, :, half[0]], enable_gqa=True, gamma=gamma
        )
        assert state.votes.requires_grad
        second, _ = selective_decode(q[:, :, half[1]], k, v, state, enable_gqa=True, gamma=gamma)
        out = torch.cat((first, second), 2)
        close([out, *torch.autograd.grad((out * upstream).sum(), list(tensors.values()))], whole)


def test_the_votes_have_a_gradient_of_their_own():
    tensors = drawn(70)
    wide = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    weight = torch.randn(1, 70, generator=torch.Generator().manual_seed(1))

    def gradients(wanted, given):
        q, k, v, gamma = given.values()
        with kernels(wanted):
            out, state = selective_decode(q, k, v, enable_gqa=True, gamma=gamma)
        return torch.autograd.grad((state.votes * weight).sum() + (out * above(70)).sum(), list(given.values()))

    ours, ordinary, true = gradients("triton", tensors), gradients("reference", tensors), gradients("reference", wide)
    for a, b, c in zip(ours, ordinary, true, strict=True):
        least = 32 * torch.finfo(a.dtype).eps if c.dim() == 0 else 0.0  # one sum, whose errors may cancel
        assert (a - c).norm() <= max(2 * (b - c).norm(), least * max(1.0, c.norm()))


@pytest.fixture
def eager_to_skip(monkeypatch):
    monkeypatch.setattr(selective, "SHORTEST_SKIP", 64)
    monkeypatch.setattr(tuned, "configs", lambda *_: [Config(16, 16, 4, 1)])


def calls(tensors):
    call = Call(
        *(tensors[n].detach() for n in ("query", "key", "value")), how=Options(0.25, True), strength=tensors["gamma"]
    )
    protected = torch.zeros(1, call.sizes[4], dtype=torch.bool)
    protected[:, 0] = True
    return call, Selection(0, protected, torch.zeros(call.sizes[0], call.sizes[4]))


def test_keys_that_count_for_nothing_are_not_visited(eager_to_skip, monkeypatch):
    tensors, upstream = drawn(100), above(100)
    with torch.no_grad():  # the same direction for all, so that everybody votes on everybody
        for name in ("query", "key"):
            tensors[name] += 2.0
    tensors["key"].detach()[:, :, 0] = 0.0
    call, who = calls(tensors)
    votes = selective.count(call, who)
    listed = launch.live_blocks(dataclasses.replace(call, death=votes.death), Config(16, 16))
    blocks = torch.arange(7)  # that causality leaves, the diagonal aside
    assert listed["Lives"].sum() < 0.6 * blocks.sum()
    assert (listed["Lives"] > 0)[:, 1:].all()  # the first key lives for ever, and so do the newest
    with kernels("triton"):
        found = outputs(tensors, upstream)
        monkeypatch.setattr(selective, "SHORTEST_SKIP", 1000)
        full = outputs(tensors, upstream)
    close(found, full, 1e-6)


def test_what_is_listed_is_what_still_counts(eager_to_skip):
    call, who = calls(drawn(200, B=2, strength=3.0))
    votes = selective.count(call, who)
    limit = selective._limit(call)
    for b in range(2):
        first = [
            next((i for i in range(0, 200, 16) if votes.penalty[b, i, j] > limit[b] and j < i), 200) for j in range(200)
        ]
        assert votes.death[b].tolist() == first
    listed = launch.live_blocks(dataclasses.replace(call, death=votes.death), Config(16, 16))
    for b in range(2):
        for block in range(13):
            count = listed["Lives"][b, block]
            alive = [n for n in range(block) if votes.death[b, n * 16 : n * 16 + 16].max() > block * 16]
            assert listed["Live"][b, block, :count].tolist() == alive


def test_a_key_on_which_nobody_may_vote_never_dies(eager_to_skip):
    call, who = calls(drawn(200, strength=5.0))
    assert (selective.count(call, who).death[:, 0] == 200).all()
    assert (selective.count(call, who).death < 200).any()


@pytest.mark.parametrize(
    "how",
    [Options(0.25), Options(0.25, True, window=50), Options(0.25, True, offset=9), Options(0.25, True)],
    ids=["all", "window", "ahead", "itself"],
)
def test_where_a_query_may_not_see_itself_nothing_is_left_out(eager_to_skip, how):
    call, who = calls(drawn(200))
    changed = dataclasses.replace(call, how=how)
    itself = how.is_causal and how.window is None and how.offset == 0
    assert (selective.count(changed, who).death is not None) == itself
