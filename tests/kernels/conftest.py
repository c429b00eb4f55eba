"""Tables, the formula fixtures (deterministic tensors without random numbers), and comparisons."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_no_worse

from attnrewrite.kernels import strips


def _numbers(text):
    return [token for token in re.split(r"[\s\[\]|,]+", text) if token]


def _assert_prints(actual, text):
    """Every number agrees with the printed one to its last digit; fewer than 8 decimals are exact values."""
    printed = _numbers(text)
    values = torch.as_tensor(actual, dtype=torch.float64).detach().flatten().tolist()
    assert len(values) == len(printed)
    for value, token in zip(values, printed, strict=True):
        decimals = max(8, len(token.partition(".")[2]))
        allowed = 0.5 * 10**-decimals * (1 + 1e-4) + 1e-15 * abs(value)
        assert abs(value - float(token)) <= allowed, f"{value!r} is not {token}, off by {value - float(token):.2e}"


@pytest.fixture(scope="session")
def assert_prints():
    return _assert_prints


@pytest.fixture(scope="session")
def table():
    """``table("[1 2] [3 4]")`` reads rows of numbers as a float64 matrix."""

    def read(text):
        rows = re.findall(r"\[([^\]]*)\]", text)
        return torch.tensor([[float(token) for token in _numbers(row)] for row in rows], dtype=torch.float64)

    return read


@pytest.fixture(scope="session")
def formulas():
    """Build q, k, v, R of the formula fixtures, all indices from 0.

    q[h,i,d] = a sin(.37 i + .91 d + 1.7 h)      k[h,j,d] = a cos(.53 j - .67 d + .9 h)
    v[h,j,d] = sin(.11 j (d+1) + .3 h)           R[h,i,d] = cos(.23 i + .41 d - .5 h)
    """

    def build(a=1.0, Hkv=4, L=64, D=16, H=4):
        i = torch.arange(L, dtype=torch.float64).reshape(1, 1, L, 1)
        d = torch.arange(D, dtype=torch.float64)
        h, g = (torch.arange(n, dtype=torch.float64).reshape(1, n, 1, 1) for n in (H, Hkv))
        query = a * torch.sin(0.37 * i + 0.91 * d + 1.7 * h)
        key = a * torch.cos(0.53 * i - 0.67 * d + 0.9 * g)
        value = torch.sin(0.11 * i * (d + 1) + 0.3 * g)
        upstream = torch.cos(0.23 * i + 0.41 * d - 0.5 * h)
        return SimpleNamespace(
            query=query.requires_grad_(),
            key=key.requires_grad_(),
            value=value.requires_grad_(),
            upstream=upstream,
        )

    return build


@pytest.fixture
def random_qkv():
    """``random_qkv(B, H, Hkv, L, D, ...)``: query, key, value of a fixed seed, requiring gradients."""

    def draw(B, H, Hkv, L, D, *, S=None, Dv=None, dtype=torch.float64, seed=0):
        source = torch.Generator().manual_seed(seed)
        S, Dv = S or L, Dv or D
        shapes = ((B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
        drawn = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes)
        return tuple(tensor.to(dtype).requires_grad_() for tensor in drawn)

    return draw


@pytest.fixture
def sparse_votes():
    """Query and key with a shared component, so that most logits are about -2 and few pairs vote.

    With independent normal query and key the far keys are dead, and an error there cannot be seen.
    """

    def draw(B, H, Hkv, L, D, *, dtype=torch.float64, seed=0):
        source = torch.Generator("cpu").manual_seed(seed)
        query, key, value = (
            torch.randn((B, heads, L, D), generator=source, dtype=torch.float64, device="cpu")
            for heads in (H, Hkv, Hkv)
        )
        query[..., 0], key[..., 0] = math.sqrt(2 * math.sqrt(D)), -math.sqrt(2 * math.sqrt(D))
        return tuple(tensor.to(dtype).requires_grad_() for tensor in (query, key, value))

    return draw


@pytest.fixture(scope="session", name="assert_no_worse")
def _assert_no_worse():
    return assert_no_worse


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_inductor():
    """Skip inductor's trial builds of one C++ file per instruction set: seconds each on a cold cache."""
    from torch._inductor import config

    with config.patch({"cpp.vec_isa_ok": True}):
        yield


@pytest.fixture
def in_both_forms(request, monkeypatch):
    """Put one form of an attention in the place of its dense reference, throughout the test's module.

    ``request.param`` is (name in the module, function, numbers in a strip).
    """
    name, function, budget = request.param
    monkeypatch.setattr(request.module, name, function)
    monkeypatch.setattr(strips, "BUDGET", budget)
