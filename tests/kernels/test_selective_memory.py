"""How many keys selective attention still needs: worked example, formula fixtures, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_support import CLOSE, causal, parts

from attnrewrite.functional import selective_memory
from attnrewrite.kernels import strips
from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.selective import reference


def draw(B, H, Hkv, L, D=4, seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = [(B, H, L, D), (B, Hkv, L, D), (B, L, 3), (B, L, 3)]
    return [torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("form", [reference.selective_memory, selective_memory])
def test_worked_example(form, table, assert_prints):
    """The example of ``test_selective_reference.py``: the soft counts of its five queries."""
    query = table("[1 0 1 0] [2 1 0 0] [0 2 1 -1] [1 1 1 1] [2 0 -1 1]").reshape(1, 1, 5, 4)
    key = table("[2 0 0 1] [1 1 0 0] [0 1 2 0] [1 0 -1 2] [0 2 1 1]").reshape(1, 1, 5, 4)
    assert_prints(form(query, key)[0], "[1 2 3 3 3]")


@pytest.mark.parametrize(
    ("a", "window", "most", "row"),
    [(1.0, None, "7.5837884293", 14), (0.5, None, "10.1880225933", 63), (0.5, 16, "9.6211508483", 15)],
)
def test_formula_fixtures(a, window, most, row, formulas, assert_prints):
    data = formulas(a)
    needed = selective_memory(data.query, data.key, window=window)[0]
    assert_prints(needed.max(), most)
    assert needed.argmax() == row


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_strips_equal_the_reference(data):
    ask = data.draw
    Hkv, L = ask(st.integers(1, 2)), ask(st.integers(1, 12))
    H = Hkv * ask(st.integers(1, 2))
    query, key, *selector = draw(2, H, Hkv, L, seed=ask(st.integers(0, 99)))
    options = {
        "window": ask(st.none() | st.integers(1, 13)),
        "softcap": ask(st.sampled_from([None, 2.0])),
        "selection_head": ask(st.integers(0, H - 1)),
        "gamma": ask(st.sampled_from([1.0, 0.5, 0.0])),
        "protect_first": ask(st.booleans()),
        "tau": ask(st.sampled_from([1.0, 0.3])),
    }
    options |= dict(zip(("vote_query", "vote_key"), selector, strict=True)) if ask(st.booleans()) else {}
    mask = {
        "none": None,
        "left padding": (torch.arange(L) >= torch.tensor([[0], [L // 2]]))[:, None, None],
        "documents": (lambda d: (d[:, None] == d)[None, None])(torch.arange(L) // 4),
        "bias": torch.randn(1, H, L, L, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    }[ask(st.sampled_from(["none", "left padding", "documents", "bias"]))]
    expected = reference.selective_memory(query, key, mask, enable_gqa=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "BUDGET", ask(st.sampled_from([20, 1 << 22])))
        torch.testing.assert_close(selective_memory(query, key, mask, enable_gqa=True, **options), expected, **CLOSE)


def test_it_is_the_sum_over_penalties_and_its_bounds(formulas):
    data = formulas(0.5)
    penalty = parts(data.query, data.key, causal(64)).penalty[0]
    found = selective_memory(data.query, data.key)[0]
    expected = (causal(64) * (1 - penalty.clamp(max=1))).sum(-1)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found >= 1).all() and (found <= torch.arange(1, 65)).all()
    unvoted = selective_memory(data.query, data.key, gamma=0.0)[0]
    assert torch.equal(unvoted, torch.arange(1.0, 65, dtype=torch.float64))


def test_a_query_that_sees_nothing_needs_nothing():
    query, key, *_ = draw(1, 2, 2, 6)
    found = selective_memory(query, key, torch.arange(6) >= 2)[0]
    assert not found[:2].any() and (found[2:] >= 1).all()


@pytest.mark.parametrize("budget", [12, 1 << 22])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3, "softcap": 1.5}, {"attn_mask": torch.arange(6) >= 2, "selection_head": 1, "tau": 0.4}],
    ids=["causal", "window", "left_padded"],
)
def test_gradients_against_differences(options, budget, monkeypatch):
    monkeypatch.setattr(strips, "BUDGET", budget)
    gamma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    query, key, *selector = draw(2, 2, 1, 6)

    def head(query, key, gamma):
        return selective_memory(query, key, enable_gqa=True, gamma=gamma, **options)

    def own(vote_query, vote_key):
        return selective_memory(query, key, enable_gqa=True, vote_query=vote_query, vote_key=vote_key, **options)

    assert torch.autograd.gradcheck(head, (query, key, gamma))
    assert torch.autograd.gradcheck(own, tuple(selector))


def test_gradient_of_a_bias():
    query, key, *_ = draw(1, 2, 2, 5)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda bias: selective_memory(query, key, bias), (bias,))


def test_torchs_own_checks():
    query, key = (x[:, :1].detach().requires_grad_() for x in draw(2, 2, 2, 6)[:2])
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for mask in (None, (torch.arange(6) >= 2)[None, None, None], torch.randn(1, 1, 6, 6, dtype=torch.float64)):
        arguments = (query, key, gamma, mask, 0.5, True, None, 2.0, True, 0.5)
        torch.library.opcheck(torch.ops.attnrewrite.selective_memory.default, arguments)


def test_16_bit_inputs_count_in_float32():
    query, key = (x.detach().bfloat16() for x in draw(1, 2, 2, 9)[:2])
    assert selective_memory(query, key).dtype == torch.float32


def test_bad_arguments():
    query, key, *selector = draw(1, 2, 2, 6)
    for wrong, said in (({"tau": 0.0}, "tau is 0.0"), ({"vote_query": selector[0]}, "missing")):
        with pytest.raises(LoweringError, match=said) as failure:
            selective_memory(query, key, **wrong)
        assert failure.value.code == "AR402"
