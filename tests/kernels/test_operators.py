"""The operators of the dense variants: torch's own checks, tracing, dropout, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite import functional
from attnrewrite.kernels import strips

B, H, HKV, L, D, DV = 2, 4, 2, 7, 4, 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def tensors(name, L=L):
    query, key, value = drawn(B, H, L, D), drawn(B, HKV, L, D, seed=1), drawn(B, HKV, L, DV, seed=2)
    if name == "symmetric":
        return key, value, drawn(H, D, D, seed=3)
    if name == "ssa":
        return query, key, value, drawn(B, H, L, seed=3), drawn(B, HKV, L, seed=4)
    return query, key, value


def run(name, *given, **options):
    return getattr(functional, f"{name}_attention")(*given, enable_gqa=True, is_causal=True, **options)


NUMBERS = {
    "selective": (0.5, 0.0, True, None, 2.0, 1, True),
    "ssa": (0.5, 0.0, True, 3, None, None, None),
    "symmetric": (0.5, 0.0, True, None, None, True, None, None),
}


@pytest.fixture(params=NUMBERS)
def name(request):
    return request.param


@pytest.mark.parametrize("bias", [False, True])
def test_torchs_own_checks(name, bias):
    operator = getattr(torch.ops.attnrewrite, f"{name}_attention").default
    extra = (torch.tensor(0.7, dtype=torch.float64, requires_grad=True),) if name == "selective" else ()
    mask = drawn(1, H, L, L, seed=5) if bias else None
    torch.library.opcheck(operator, (*tensors(name), *extra, mask, None, *NUMBERS[name]))


@pytest.mark.parametrize("budget", [60, 1 << 22])
def test_gradients_against_differences(name, budget, monkeypatch):
    monkeypatch.setattr(strips, "BUDGET", budget)
    assert torch.autograd.gradcheck(lambda *x: run(name, *x, softcap=3.0), tensors(name))


def test_dropout_is_drawn_again_alike(name, monkeypatch):
    monkeypatch.setattr(strips, "BUDGET", 60)

    def dropped(*x):
        torch.manual_seed(3)
        return run(name, *x, dropout_p=0.4)

    assert torch.autograd.gradcheck(dropped, tensors(name))
    assert not torch.equal(run(name, *tensors(name), dropout_p=0.4), run(name, *tensors(name), dropout_p=0.4))


def test_compiled_with_dynamic_lengths(name):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: run(name, *x), backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        given = tensors(name, length)
        ours, theirs = compiled(*given), run(name, *given)
        assert torch.equal(ours, theirs)
        upstream = torch.ones_like(ours)
        for a, b in zip(*(torch.autograd.grad(x, given, upstream) for x in (ours, theirs)), strict=True):
            assert torch.equal(a, b)


def test_exported_saved_and_loaded(name, tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, *x):
            return run(name, *x)

    given = tuple(x.detach() for x in tensors(name))
    torch.export.save(torch.export.export(Layer(), given), tmp_path / "layer.pt2")
    assert torch.equal(torch.export.load(tmp_path / "layer.pt2").module()(*given), run(name, *given))


def test_flops_are_counted(name):
    given = tensors(name)
    with FlopCounterMode(display=False) as counter:
        out = run(name, *given)
    pairs = 2 * B * H * L * L
    made_queries = 2 * B * H * L * D * D if name == "symmetric" else 0
    assert counter.get_total_flops() == pairs * (D + DV) + made_queries
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() >= pairs * (3 * D + 2 * DV)


def test_arguments_of_other_strides_and_stride_zero(name):
    given = tensors(name)
    expected = run(name, *given)
    turned = [x.mT.contiguous().mT if x.dim() > 2 else x for x in given]
    torch.testing.assert_close(run(name, *turned), expected)
    flat = [x[..., :1].expand_as(x) for x in given]
    torch.testing.assert_close(run(name, *flat), run(name, *(x.contiguous() for x in flat)))


def test_nan_reaches_the_rows_that_see_it(name):
    given = [x.detach().clone() for x in tensors(name)]
    given[0][0, 0, 5, 0] = float("nan")
    out = run(name, *given)[0, 0]
    assert out[:5].isfinite().all() and out[5:].isnan().any()
