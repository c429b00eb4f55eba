"""Tiles that come by tensor descriptors: the same bits, wherever they are legal, and nowhere else."""

import contextvars
import itertools

import pytest
import torch
from dense_support import CAUSAL, DEVICE, drawn, normal, ours, outputs, temperatures
from triton.runtime import _allocation

from attnrewrite.kernels.dense import launch, selective, tuned
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.descriptors import LOADED, describable, has_unit, with_scratch
from attnrewrite.kernels.dense.space import SPACES

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("on_the_device")]
PLAIN = Config(32, 32, 4, 1)
BY_TMA = PLAIN._replace(descriptors=True)


@pytest.fixture
def run(monkeypatch):
    """``run(tensors, first, **how)``: output, gradients, and the kernels that were launched with descriptors."""
    own = tuned.configurations

    def run(tensors, first, **how):
        met = []

        def configurations(launch):
            return (first, PLAIN) if launch.name in LOADED else own(launch)

        def spy(start, device):
            met.append(start.keywords["DESCRIPTORS"])
            with_scratch(start, device)

        monkeypatch.setattr(tuned, "configurations", configurations)
        monkeypatch.setattr(launch, "with_scratch", spy)
        upstream = normal((*tensors["query"].shape[:3], tensors["value"].shape[3]), 7)
        torch.manual_seed(0)
        with kernels("triton"):
            return outputs(ours, tensors, upstream, how), len(met)

    return run


def check(run, tensors, launches=3, **how):
    found, described = run(tensors, BY_TMA, **how)
    expected, none = run(tensors, PLAIN, **how)
    assert (described, none) == (launches, 0)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if DEVICE.type == "cpu" else torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize("L", [1, 63, 111, 130])
@pytest.mark.parametrize("gamma", [None, 1.0], ids=["plain", "selective"])
def test_lengths(run, L, gamma):
    tensors = drawn(L, S=max(L, 40)) if gamma is None else drawn(L)
    if gamma is not None:
        tensors["gamma"] = torch.tensor(gamma, device=DEVICE)
    short = L == 1  # the forward pass of a few queries splits the keys, and counts votes in passing
    check(run, tensors, 2 if short else 3, **CAUSAL)


@pytest.mark.parametrize(
    "sizes",
    [
        {"H": 4, "Hkv": 2},
        {"B": 2, "H": 3, "Hkv": 1},
        {"D": 16, "Dv": 32},
        {"D": 24, "Dv": 40},
        {"D": 24, "dtype": torch.bfloat16},
        {"D": 80, "Dv": 16, "dtype": torch.float16},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"is_causal": True, "window": 20, "softcap": 2.0}], ids=str)
def test_sizes(run, sizes, how):
    check(run, drawn(50, **sizes), **how)


def test_dropout(run):
    check(run, drawn(50, H=4, Hkv=2), dropout_p=0.3, **CAUSAL)


def test_selective_attention_in_groups(run):
    tensors = drawn(70, H=4, Hkv=2, dtype=torch.bfloat16) | {"gamma": torch.tensor(1.0, device=DEVICE)}
    check(run, tensors, **CAUSAL)


def test_dead_keys_are_left_out(run, monkeypatch):
    monkeypatch.setattr(selective, "SHORTEST_SKIP", 200)
    tensors = drawn(260, H=1, Hkv=1) | {"gamma": torch.tensor(5.0, device=DEVICE)}
    check(run, tensors, **CAUSAL)


def test_temperatures(run):
    tensors = drawn(50)
    check(run, tensors | temperatures(tensors), **CAUSAL)


def test_heads_beside_features(run):
    """As projections leave them: ``[B, L, H, D]``, seen as ``[B, H, L, D]``."""
    tensors = drawn(50, H=3, Hkv=3)
    turned = {n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n, x in tensors.items()}
    assert not turned["key"].is_contiguous()
    check(run, turned, **CAUSAL)


def padded_to(features):
    """Keys whose rows lie ``features`` apart, of which they have 16."""
    return normal((1, 2, 50, features), 3)[..., :16].detach().requires_grad_()


def test_rows_that_start_anywhere_are_loaded_without(run):
    tensors = drawn(50)
    check(run, tensors | {"key": padded_to(20)}, **CAUSAL)
    check(run, tensors | {"key": padded_to(18)}, 1, **CAUSAL)  # 72 bytes: only what loads queries still can
    check(run, tensors | {"query": padded_to(18)}, 2, **CAUSAL)
    check(run, drawn(50, D=18), 0, **CAUSAL)
    check(run, drawn(50, D=20, dtype=torch.bfloat16), 0, **CAUSAL)


WHOLE = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "legal"),
    [
        (WHOLE, True),
        (WHOLE.transpose(1, 2), True),
        (WHOLE[:, :, 1:], True),
        (WHOLE[..., :20], True),
        (WHOLE[..., 8:], True),
        (WHOLE[:, 0], True),
        (WHOLE[..., 4:], False),
        (WHOLE.mT, False),
        (WHOLE[..., ::2], False),
        (WHOLE[:, :, :1].expand(-1, -1, 64, -1), False),
        (WHOLE[:, :1].expand(-1, 3, -1, -1), False),
        (torch.ones(()).expand(1, 2, 50, 16), False),  # the gradient of a sum
        (WHOLE.flatten()[: 2 * 3 * 5 * 20].view(2, 3, 5, 20), False),
        (WHOLE.as_strided((2, 3, 5, 64), (12288, 4096, 8, 1)), False),
        (WHOLE.flatten()[1:4097].view(1, 1, 64, 64), False),
    ],
)
def test_what_descriptors_can_describe(tensor, legal):
    assert describable(tensor) == legal


def test_targets():
    having = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a"]
    assert [x for x in having if has_unit(x)] == ["sm_90", "sm_100", "sm_120"]


def test_only_kernels_that_load_by_descriptors_declare_them():
    assert {name for name, space in SPACES.items() if True in space.descriptors} == set(LOADED)
    for name in LOADED:
        sides = itertools.chain(SPACES[name].block_m, SPACES[name].block_n)
        assert all(16 <= side <= 256 for side in sides)  # what TMA can copy at once: 16 bytes, 256 elements a side


def test_a_launch_asks_our_allocator_and_leaves_the_users_alone():
    asked = []

    def theirs(size, alignment, stream):
        asked.append(size)

    def start():
        made = _allocation._allocator.get()(384, 128, None)
        assert (made.numel() * made.element_size(), made.device.type) == (384, DEVICE.type)

    def user():
        _allocation.set_allocator(theirs)
        with_scratch(start, DEVICE)
        assert _allocation._allocator.get() is theirs

    contextvars.copy_context().run(user)
    assert not asked
    with pytest.raises(ZeroDivisionError):
        with_scratch(lambda: 1 // 0, DEVICE)
