"""What the sea reference does with 16-bit inputs, and how much memory it takes."""

import pytest
import torch
from sea_support import draw_tensors, run, selected_sets
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnrewrite.kernels.sea import selection
from attnrewrite.kernels.sea.reference import sea_attention
from attnrewrite.kernels.sea.slices import Rule


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        strides = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 for t in made if t.numel()]
        self.numel = max([self.numel, *strides])
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_ordinary_pytorch(assert_no_worse, dtype):
    for seed in range(3):
        *tensors, estimated, _, _ = draw_tensors(2, 4, 4, 63, 16, 8, dtype=dtype, seed=seed)
        masks = [selected_sets(estimated[b : b + 1], Rule(6), is_causal=True) for b in range(2)]
        mask = torch.tensor([[[[j in keys for j in range(63)] for keys in head] for head in sets] for sets in masks])
        exact_tensors = [t.detach().double().requires_grad_() for t in tensors]
        exact = sea_attention(*exact_tensors, estimated, is_causal=True, budget=6)
        ours = sea_attention(*tensors, estimated, is_causal=True, budget=6)
        logits = (tensors[0] @ tensors[1].mT / 4).float().masked_fill(~mask, torch.finfo(torch.float32).min)
        weights = logits.softmax(-1) * mask
        ordinary = weights.to(dtype) @ tensors[2]
        assert ours.dtype == dtype
        assert_no_worse(ours, ordinary, exact, "output")
        upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        grads = zip(
            torch.autograd.grad(ours, tensors, upstream),
            torch.autograd.grad(ordinary, tensors, upstream),
            torch.autograd.grad(exact, exact_tensors, upstream.double()),
            strict=True,
        )
        for name, trio in zip(("dq", "dk", "dv"), grads, strict=True):
            assert_no_worse(*trio, name)


def test_autocast_does_not_reach_it():
    tensors = [t.detach() for t in draw_tensors(1, 2, 2, 20, 4, 5, dtype=torch.float32)]
    for is_causal in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            under = run(tensors, is_causal=is_causal)
        assert torch.equal(under, run(tensors, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_memory_grows_with_the_length_and_not_its_square(monkeypatch, is_causal, masked):
    monkeypatch.setattr(selection, "_CHUNK", 2**14)
    largest = {}
    for L in (256, 1024):
        tensors = [t.detach() for t in draw_tensors(1, 2, 2, L, 4, 8, dtype=torch.float32)]
        with Largest() as seen:
            run(tensors, is_causal=is_causal, attn_mask=torch.ones(L, dtype=torch.bool) if masked else None)
        largest[L] = seen.numel
    assert largest[1024] <= 4 * largest[256]
    assert largest[1024] < 1024 * 1024 / 8
