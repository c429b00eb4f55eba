"""Selective attention on generated kernels: votes of a selector, and the gradient by a bias, which votes too."""

import pytest
import torch
from dense_support import compare, drawn, normal, outputs

from attnrewrite.functional import SelectionState, selective_attention, selective_decode
from attnrewrite.kernels.dense import heights, selective
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.diagnostics import AttnRewriteError
from attnrewrite.kernels.selective.step import step as selective_step

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("on_the_device", "poisoned")]


def selecting(L, B=1, Ds=8, dtype=torch.float32, **shape):
    """Query, key, value, gamma, and the queries and keys of a selector; all learn."""
    own = {n: normal((B, L, Ds), seed).to(dtype).requires_grad_() for seed, n in enumerate(("vote_query", "vote_key"))}
    return {**drawn(L, B=B, dtype=dtype, **shape), "gamma": torch.tensor(0.7, requires_grad=True), **own}


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"L": 63, "H": 4, "Hkv": 2, "B": 2}, {}),
        ({"L": 40, "Ds": 24, "Dv": 24}, {"window": 9, "softcap": 2.0}),
        ({"L": 50, "dtype": torch.bfloat16}, {}),
    ],
    ids=str,
)
def test_selector(shape, how):
    compare(selecting(**shape), is_causal=True, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("strength", [-0.4, 0.0, 3.0])
def test_strength(strength, dtype):
    tensors = drawn(70, H=2, dtype=dtype)
    compare({**tensors, "gamma": torch.tensor(strength, requires_grad=True)}, is_causal=True)


@pytest.mark.parametrize("strength", [-0.4, 0.0, 3.0])
@pytest.mark.parametrize(("steps", "recent"), [(1, 1), (3, 1), (3, 3)])
def test_a_key_with_infinite_votes_takes_no_part(strength, steps, recent):
    """It was evicted, whatever the strength is."""
    votes = torch.zeros(1, 40)
    votes[:, 5] = torch.inf
    state = votes, torch.zeros(1, 40, dtype=torch.bool), None, None, None, None

    def step(**changed):
        tensors = {**drawn(40, H=2), "gamma": torch.tensor(strength, requires_grad=True)}
        query, key, value, gamma = tensors.values()
        with torch.no_grad():
            value[:, :, 5] = changed.get("value", 1.0)
        numbers = 0.25, 0.0, None, None, 0, True
        out, received, _ = selective_step(query[:, :, -steps:], key, value, gamma, *state, *numbers, recent=recent)
        assert (received[:, :, 5] == torch.inf).all()
        return out, *(torch.autograd.grad(out.sum(), list(tensors.values())) if recent == 1 else ())

    with kernels("triton"):
        found = step()
        for a, b in zip(found, step(value=1e4), strict=True):
            assert torch.equal(a, b)
    with kernels("reference"):
        for a, b in zip(found, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["keys", "bias"])
def test_a_mask_hides_keys_from_a_selector_and_a_bias_is_not_in_its_votes(kind):
    mask = torch.arange(30).view(1, 1, 1, 30) >= torch.tensor([0, 7]).view(2, 1, 1, 1)
    if kind == "bias":
        mask = torch.where(mask, normal((1, 2, 30, 30), 5), -torch.inf).requires_grad_()
    compare({**selecting(30, B=2), "attn_mask": mask}, is_causal=True)


@pytest.mark.parametrize(
    ("shape", "softcap"), [((2, 30, 30), 1.5), ((30, 30), 1.5), ((30, 30), None), ((1, 1, 1, 30), None)], ids=str
)
def test_gradient_by_a_bias(shape, softcap):
    tensors = {**drawn(30, H=2), "attn_mask": normal(shape, 3).requires_grad_(), "gamma": torch.tensor(0.7)}
    compare(tensors, is_causal=True, softcap=softcap)


@pytest.mark.parametrize("voting", ["selector", "head"])
def test_strips_change_nothing(monkeypatch, voting):
    tensors = {**selecting(70), "attn_mask": normal((1, 2, 70, 70), 3).requires_grad_()}
    if voting == "head":
        del tensors["vote_query"], tensors["vote_key"]
    upstream = normal((1, 2, 70, 16), 7)
    with kernels("triton"):
        whole = outputs(selective_attention, tensors, upstream, {})
        monkeypatch.setattr(heights, "LARGEST_PENALTY", 70 * 32 * 4)
        monkeypatch.setattr(heights, "STEP", 16)
        for a, b in zip(outputs(selective_attention, tensors, upstream, {}), whole, strict=True):
            assert (a - b).norm() <= 2e-6 * max(1.0, b.norm())


def test_a_selector_votes_step_by_step():
    tensors = {n: x.detach() for n, x in selecting(40).items()}
    q, k, v, gamma, vote_query, vote_key = tensors.values()
    with kernels("reference"):
        whole = selective_attention(**tensors)
    state, found = None, []
    with kernels("triton"):
        for start, stop in ((0, 20), (20, 21), (21, 24), (24, 40)):
            own = {"gamma": gamma, "vote_query": vote_query[:, start:stop], "vote_key": vote_key[:, :stop]}
            out, state = selective_decode(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], state, **own)
            found.append(out)
    assert (torch.cat(found, 2) - whole).norm() <= 2e-6 * whole.norm()


@pytest.mark.parametrize("how", [{}, {"window": 5}, {"protect_first": False}, {"mask": 2}], ids=str)
def test_a_budget_evicts_the_same_keys_step_by_step(how):
    q, k, v = (x.detach() for x in drawn(24, B=2).values())
    hidden = torch.arange(24).view(1, 1, 1, 24) >= torch.tensor([0, how.pop("mask", 0)]).view(2, 1, 1, 1)
    found = []
    for wanted in ("reference", "triton"):
        with kernels("reference"):
            out, state = selective_decode(q[:, :, :8], k[:, :, :8], v[:, :, :8], None, hidden[..., :8], budget=6, **how)
        outs = []
        with kernels(wanted):
            for n in range(9, 25):
                out, state = selective_decode(
                    q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], state, hidden[..., :n], budget=6, **how
                )
                outs.append(out)
        found.append((torch.cat(outs, 2), state.votes))
    (a, votes), (b, others) = found
    assert torch.equal(votes.isinf(), others.isinf())
    assert (votes.isfinite().sum(-1) <= 6).all()
    assert (a - b).norm() <= 2e-6 * b.norm()
    assert torch.allclose(votes, others, atol=1e-5)


def test_a_budget_goes_row_by_row_and_has_no_gradient():
    q, k, v = drawn(8).values()
    with kernels("triton"):
        for query in (q.detach(), q[:, :, :1]):
            with pytest.raises(AttnRewriteError, match="budget") as caught:
                state = None if query.shape[2] == 8 else SelectionState(torch.zeros(1, 7), torch.zeros(1, 7).bool())
                selective_decode(query, k.detach(), v.detach(), state, budget=4)
            assert caught.value.code == "AR403"


def test_the_votes_that_are_left_have_a_gradient_though_their_keys_are_dead(monkeypatch):
    """A key that no query counts any more still collects votes, and a loss on the votes reaches their queries."""
    monkeypatch.setattr(selective, "SHORTEST_SKIP", 1)
    tensors = drawn(48)
    tensors = {n: (3 * x).detach().requires_grad_() for n, x in tensors.items()}
    found = []
    for wanted in ("reference", "triton"):
        with kernels(wanted):
            out, state = selective_decode(**tensors, gamma=2.0)
            loss = out.sum() + (state.votes * normal((1, 48), 4)).sum()
            found.append(torch.autograd.grad(loss, list(tensors.values())))
    for a, b in zip(*reversed(found), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_a_selector_of_another_precision_has_no_kernel():
    tensors = selecting(4)
    tensors["vote_query"] = tensors["vote_query"].half()
    assert selective_attention(**tensors).shape == (1, 2, 4, 16)
    with kernels("triton"), pytest.raises(AttnRewriteError, match="float16") as caught:
        selective_attention(**tensors)
    assert caught.value.code == "AR403"
