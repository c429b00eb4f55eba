"""SSA's gates: of a head's own features, and of those of all heads (arXiv 2411.12892, token-aware temperature)."""

import pytest
import torch

from attnrewrite import AttnRewriteError
from attnrewrite.kernels.ssa.reference import temperature

B, H, L, D = 2, 3, 5, 4
INDEX = torch.arange(1, L + 1)


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def by_definition(projection, gate, gain):
    """One token and head at a time; ``gate`` [F, H, D]."""
    out = torch.empty(B, H, L, dtype=torch.float64)
    gelu = 0.5 * projection * (1 + torch.erf(projection / 2**0.5))
    for b in range(B):
        for h in range(H):
            for n in range(L):
                f = (gelu[b, :, n] * gate[min(h, len(gate) - 1)]).sum()
                out[b, h, n] = f.tanh() + 1 + gain * torch.tensor(n + 1.0).double().log()
    return out


@pytest.mark.parametrize("kinds", [H, 1], ids=["full", "shared"])
def test_gates_on_the_features_of_all_heads(kinds):
    projection, gate = drawn(B, H, L, D), drawn(kinds, H, D)
    found = temperature(projection, gate, 0.3, INDEX)
    torch.testing.assert_close(found, by_definition(projection, gate, 0.3), rtol=1e-13, atol=1e-13)
    assert found.shape == (B, H, L)


def test_a_head_gate_is_the_diagonal_of_a_full_one():
    projection, gate = drawn(B, H, L, D), drawn(H, D)
    whole = torch.zeros(H, H, D, dtype=torch.float64)
    whole[range(H), range(H)] = gate
    ours, theirs = (temperature(projection, w, 0.5, INDEX) for w in (gate, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_without_a_gate_only_the_position_counts():
    found = temperature(drawn(B, H, L, D), None, 0.5, INDEX)
    assert torch.equal(found, (1 + 0.5 * INDEX.double().log()).expand(B, H, L))
    assert torch.equal(temperature(drawn(B, H, L, D), None, 0.0, INDEX), torch.ones(B, H, L, dtype=torch.float64))


@pytest.mark.parametrize("kinds", [H, 1])
def test_zero_gates_give_exactly_one_and_are_alive(kinds):
    gate = torch.zeros(kinds, H, D, dtype=torch.float64, requires_grad=True)
    found = temperature(drawn(B, H, L, D), gate, 0.0, INDEX)
    assert torch.equal(found, torch.ones_like(found))
    (found * drawn(B, H, L)).sum().backward()
    assert bool((gate.grad != 0).all())


def test_autocast_leaves_them_in_full_precision():
    projection, gate = drawn(B, H, L, D).float(), drawn(H, H, D).float()
    plain = temperature(projection, gate, 0.0, INDEX)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(temperature(projection, gate, 0.0, INDEX), plain)


@pytest.mark.parametrize("shape", [(2, H, D), (H, H), (H, H, D, 1), (D,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(AttnRewriteError, match="AR402"):
        temperature(drawn(B, H, L, D), drawn(*shape), 0.0, INDEX)
