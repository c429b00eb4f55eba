"""What cannot become symmetric attention is named, and the model stays as it was."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from spellings import WIDTH, MultiheadAttention
from symmetric_models import ALL, SYMMETRIC, model_of, untouched
from torch import Tensor, nn

import attnrewrite
from attnrewrite import AttnRewriteError, SymmetricConfig

X = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Separate(nn.Module):
    """Attention whose projections a test may spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def queries(self, x: Tensor) -> Tensor:
        out: Tensor = self.q(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.queries(x) @ self.k(x).mT * 0.2, -1) @ self.v(x)


class LowRank(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def queries(self, x: Tensor) -> Tensor:
        return self.q(x) + self.up(self.down(x))  # type: ignore[no-any-return]  # a tensor


class OtherInput(Separate):
    def queries(self, x: Tensor) -> Tensor:
        return self.q(x.tanh())  # type: ignore[no-any-return]  # a tensor


class ByHand(Separate):
    def queries(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight, self.q.bias)


class Tied(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.q.weight = self.v.weight


class Missing(Separate):
    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.k.weight, float("nan"))


class Cross(Separate):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x.flip(1) if other is None else other
        return torch.softmax(self.q(x) @ self.k(other).mT * 0.2, -1) @ self.v(other)


class Subclass(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.q = type("MyLinear", (nn.Linear,), {})(WIDTH, WIDTH)


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (LowRank, "made by 2 linear maps"),
    (OtherInput, "projections of different inputs"),
    (ByHand, "q.weight in the model itself: tied, or used without its own module"),
    (Tied, "v.weight in q: tied"),
    (Missing, "not finite"),
    (Subclass, "is a .*MyLinear; needed is torch.nn.Linear"),
    (MultiheadAttention, r"in a torch.nn.MultiheadAttention.* Write the layer with a torch.nn.Linear for each"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_projections_that_cannot_be_shared_are_refused(make: Callable[[], nn.Module], said: str) -> None:
    model = make()
    failure = untouched(model, lambda: attnrewrite.convert(model, ALL, example_inputs=(X,)))
    assert failure.code == "AR307"
    assert re.search(said, str(failure))


def test_cross_attention_and_groups_are_refused() -> None:
    model = Cross()
    failure = untouched(model, lambda: attnrewrite.convert(model, ALL, example_inputs=(X, X + 1)))
    assert (failure.code, "different sequences" in str(failure)) == ("AR307", True)
    llama, inputs = model_of("llama")
    failure = untouched(llama, lambda: attnrewrite.convert(llama, SYMMETRIC, example_kwargs=inputs))
    assert (failure.code, "equal queries" in str(failure)) == ("AR307", True)


def test_fits_that_are_too_far_off_change_nothing() -> None:
    model, inputs = model_of("bert")
    failure = untouched(model, lambda: attnrewrite.convert(model, SymmetricConfig(), example_kwargs=inputs))
    assert failure.code == "AR321"
    with pytest.raises(AttnRewriteError, match="AR303"):
        SymmetricConfig(max_error=-0.1)
    with pytest.raises(AttnRewriteError, match=r"AR304.*\n.*replaces projections"):
        attnrewrite.Backend(variant=SymmetricConfig())


def test_an_interrupted_conversion_brings_every_module_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("gpt2")
    modules, expected = dict(model.named_modules()), model(**inputs)[0]
    calls: list[str] = []
    put = nn.Module.set_submodule

    def interrupted(self: nn.Module, path: str, module: nn.Module) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(self, path, module)

    monkeypatch.setattr(nn.Module, "set_submodule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attnrewrite.convert(model, ALL, example_kwargs=inputs)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(**inputs)[0], expected)
