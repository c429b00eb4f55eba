"""The operators on generated kernels: under tracers, in the report, and where the device cannot run a kernel."""

import pytest
import torch

from attnrewrite.functional import attention, selective_attention, ssa_attention, symmetric_attention
from attnrewrite.kernels.dense import fallback, launch
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.diagnostics import AttnRewriteError, AttnRewriteWarning


def drawn(*shape, seed=0, **more):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **more).requires_grad_()


@pytest.fixture
def tensors():
    return [drawn(1, 2, 20, 16, seed=n) for n in range(3)]


def test_opcheck(tensors):
    from attnrewrite.kernels.dense import op, selective_op, symmetric_op  # noqa: F401  # define operators

    operators = torch.ops.attnrewrite
    mask = torch.rand(20, 20) > 0.5
    numbers = (0.25, 0.0, True, None, None)
    added = drawn(2, seed=4), torch.tensor([0.5, 0.25])
    torch.library.opcheck(operators.dense_attention.default, (*tensors, mask, None, None, *added, None, *numbers))
    votes, protected = torch.rand(1, 20).requires_grad_(), torch.zeros(1, 20, dtype=torch.bool)
    before = (*tensors, torch.tensor(0.5, requires_grad=True), votes)
    behind = (*added, protected, None, None, *numbers, 0, 0, 1)
    for voters in ((None, None, None), (drawn(20, 20), drawn(1, 20, 8), drawn(1, 20, 8, seed=1))):
        torch.library.opcheck(operators.selective_kernels.default, (*before, *voters, *behind))
    pair = drawn(2, 16, 16)
    torch.library.opcheck(operators.symmetric_kernels.default, (*tensors[:2], pair, None, *added, None, *numbers))


def outputs(function, learn, upstream):
    out = function()
    return [out, *torch.autograd.grad((out * upstream).sum(), learn)]


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"is_causal": True},
        {"softcap": 2.0},
        {"attn_mask": torch.arange(40).view(1, 1, 1, 40) >= torch.tensor([0, 18]).view(2, 1, 1, 1)},
        {"attn_mask": torch.zeros(40, 40).requires_grad_()},
    ],
    ids=["plain", "causal", "softcap", "padding", "bias"],
)
def test_symmetric_attention(pairwise, how):
    shared, value, pair = drawn(2, 2, 40, 16), drawn(2, 2, 40, 24, seed=1), drawn(2, 16, 16, seed=2)
    pair = pair if pairwise else None
    learn = [x for x in (shared, value, pair, how.get("attn_mask")) if x is not None and x.requires_grad]
    upstream = torch.randn(2, 2, 40, 24)
    found = []
    for wanted in ("reference", "triton"):
        with kernels(wanted):
            found.append(outputs(lambda: symmetric_attention(shared, value, pair, **how), learn, upstream))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_shared_gradients_in_half_precision(assert_no_worse):
    """A tile that serves twice is rounded once: no worse than two tiles."""
    shared, value = drawn(1, 2, 111, 24, dtype=torch.bfloat16), drawn(1, 2, 111, 24, seed=1, dtype=torch.bfloat16)
    upstream = drawn(1, 2, 111, 24, seed=2, dtype=torch.bfloat16).detach()
    wide = [x.detach().double().requires_grad_() for x in (shared, value)]
    with kernels("reference"):
        true = outputs(lambda: symmetric_attention(*wide), wide, upstream.double())
        ordinary = outputs(lambda: torch.softmax(shared @ shared.mT * 24**-0.5, -1) @ value, [shared, value], upstream)
    with kernels("triton"):
        ours = outputs(lambda: symmetric_attention(shared, value), [shared, value], upstream)
    for a, b, c in zip(ours, ordinary, true, strict=True):
        assert_no_worse(a, b, c)


@pytest.fixture
def broken(monkeypatch):
    """A device that can run none of the kernels in ``names``; yields the set."""
    names, real = set(), launch.load

    def load(emitted):
        from triton.runtime.errors import OutOfResources

        if any(name in emitted.name for name in names):
            raise OutOfResources(300_000, 232_448, "shared memory")
        return real(emitted)

    monkeypatch.setattr(launch, "load", load)
    monkeypatch.setattr(launch, "_FAILED", set())
    monkeypatch.setattr(fallback, "_REFERENCE", set())
    return names


FUNCTIONS = {
    "plain": attention,
    "ssa": lambda q, k, v, **how: ssa_attention(q, k, v, q.sum(-1).sigmoid(), k.sum(-1).sigmoid(), **how),
    "selective": lambda q, k, v, is_causal: selective_attention(q, k, v, gamma=0.5),
    "symmetric": lambda q, k, v, **how: symmetric_attention(k, v, **how),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("missing", ["attention_forward", "attention_backward_keys"])
def test_the_reference_runs_where_the_device_cannot_and_says_so_once(tensors, broken, name, missing):
    upstream = torch.randn(1, 2, 20, 16)
    learn = tensors[1:] if name == "symmetric" else tensors
    with kernels("reference"):
        true = outputs(lambda: FUNCTIONS[name](*tensors, is_causal=True), learn, upstream)
    broken.add(missing)
    with kernels("triton"), pytest.warns(AttnRewriteWarning, match=r"(?s)AR405.*shared memory") as caught:
        found = outputs(lambda: FUNCTIONS[name](*tensors, is_causal=True), learn, upstream)
        outputs(lambda: FUNCTIONS[name](*tensors, is_causal=True), learn, upstream)
    assert len([x for x in caught if x.category is AttnRewriteWarning]) == 1
    for a, b in zip(found, true, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_dropout_is_not_drawn_anew_by_another_rule(tensors, broken):
    with kernels("triton"):
        out = attention(*tensors, dropout_p=0.5)
        broken.add("attention_backward_keys")
        with pytest.raises(AttnRewriteError, match="dropout") as caught:
            out.sum().backward()
    assert caught.value.code == "AR405"
