"""Symmetric attention as a rewrite: what the compiled layer computes, against the formulas written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled import HEADS, WIDTH, Attention
from families import FAMILIES, build, padded
from torch import Tensor, nn

import attnrewrite
from attnrewrite import AttnRewriteError, SymmetricConfig
from attnrewrite.conversion import new_parameters
from attnrewrite.kernels.symmetric.reference import symmetric_attention
from attnrewrite.passes.report import Report

LENGTH = 9
BY_NAME = {family.name: family for family in FAMILIES}
pytestmark = pytest.mark.filterwarnings("ignore:AR320")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Causal(Attention):
    def mask(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))


class Window(Attention):
    def mask(self, scores: Tensor) -> Tensor:
        i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
        return scores.masked_fill((j > i) | (j <= i - 3), float("-inf"))


class Biased(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def mask(self, scores: Tensor) -> Tensor:
        return scores + self.bias


class Capped(Attention):
    def mask(self, scores: Tensor) -> Tensor:
        return 2.0 * torch.tanh(scores / 2.0)


class Shared(nn.Module):
    """One head group by group, by the reference: ``mask`` and the like are its arguments."""

    def __init__(self, model: Attention, **how: Any) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        pair = model.q.matrices() if model.q.pair is not None else None
        r, v = model.split(model.k(x)), model.split(model.v(x))
        how = {**self.how, "attn_mask": self.how["attn_mask"](model)} if "attn_mask" in self.how else self.how
        out = symmetric_attention(r, v, pair, **how)
        return model.o(out.transpose(-3, -2).flatten(-2))


CASES: list[tuple[type[Attention], dict[str, Any]]] = [
    (Attention, {}),
    (Causal, {"is_causal": True}),
    (Window, {"is_causal": True, "window": 3}),
    (Biased, {"attn_mask": lambda model: model.bias}),
    (Capped, {"softcap": 2.0}),
]


def converted(host: type[Attention], config: SymmetricConfig) -> Attention:
    model = host().double()
    attnrewrite.convert(model, config, example_inputs=(x(),))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def x() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("form", ["symmetric", "pairwise"])
@pytest.mark.parametrize(("host", "how"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_values_and_gradients_are_those_of_the_reference(
    host: type[Attention], how: dict[str, Any], form: str, mask_self: bool
) -> None:
    model = converted(host, SymmetricConfig(form=form, max_error=1.0, mask_self=mask_self))  # type: ignore[arg-type]  # a Literal
    by_hand = copy.deepcopy(Shared(model, **how, mask_self=mask_self))
    found, expected = model(x()), by_hand(x())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(found.shape, dtype=found.dtype)
    for out in (found, expected):
        (out * weights).sum().backward()
    theirs = dict(by_hand.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-9, msg=name)


def drawn(model: nn.Module, *args: Any, **kwargs: Any) -> list[list[str]]:
    """Return the operators that take the place of each site."""
    reports: list[Report] = []
    model.compile(backend=attnrewrite.Backend(inner="eager", strict=True, report=reports.append))
    with torch.no_grad():
        model(*args, **kwargs)
    return [[box.op for box in r.drawings[s.after].nodes if box.op != "input"] for r in reports for s in r.sites]


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
def test_where_queries_are_keys_the_operator_takes_one_tensor(name: str) -> None:
    model, inputs = build(BY_NAME[name], "sdpa"), BY_NAME[name].inputs()
    attnrewrite.convert(model, SymmetricConfig("symmetric", max_error=1.0), example_kwargs=inputs)
    assert all(ops == ["attnrewrite::symmetric_attention"] for ops in drawn(model, **inputs))


def test_norms_of_their_own_make_queries_and_keys_two_tensors() -> None:
    class Normed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm, self.k_norm = (nn.LayerNorm(WIDTH // HEADS) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
            weights = torch.softmax(self.q_norm(q) @ self.k_norm(k).mT * 0.5, -1)
            return self.o((weights @ v).transpose(-3, -2).flatten(-2))

    model = converted(Normed, SymmetricConfig("symmetric", max_error=1.0))
    r, v = (model.split(layer(x())) for layer in (model.k, model.v))
    weights = torch.softmax(model.q_norm(r) @ model.k_norm(r).mT * 0.5, -1)
    expected = model.o((weights @ v).transpose(-3, -2).flatten(-2))
    torch.testing.assert_close(model(x()), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", ["symmetric", "pairwise"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "bert"])
def test_a_layer_is_the_host_on_its_new_projections(name: str, form: str) -> None:
    """Without the marker the model runs its own attention on r: masks, caps, rotation and groups are the host's."""
    family = BY_NAME[name]
    model, inputs = build(family, "eager"), family.inputs()
    inputs = padded(inputs) if family.padded else inputs
    if form == "symmetric" and family.kv_heads != 4:
        with pytest.raises(AttnRewriteError, match="AR307"):
            attnrewrite.convert(model, SymmetricConfig(form="symmetric", max_error=1.0), example_kwargs=inputs)
        return
    attnrewrite.convert(model, SymmetricConfig(form=form, max_error=1.0), example_kwargs=inputs)  # type: ignore[arg-type]  # a Literal
    with torch.no_grad():
        for _, parameter in new_parameters(model):
            parameter.mul_(8.0)
    host, real = unmarked(model), inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs)[0][real], host(**inputs)[0][real], rtol=1e-4, atol=1e-5)


def unmarked(model: nn.Module) -> nn.Module:
    host = copy.deepcopy(model)
    for module in host.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    return host


def test_mask_self_needs_to_know_where_a_query_stands() -> None:
    """A mask over other keys that says nothing of positions: refused, where without mask_self it is the host."""

    class Memory(Attention):
        def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            scores = q @ k.mT * 0.5
            if seen is not None:
                scores = (q[..., -4:, :] @ k.mT * 0.5).masked_fill(~seen, float("-inf"))
            return self.o((torch.softmax(scores, -1) @ v).transpose(-3, -2).flatten(-2))

    seen = torch.rand(4, LENGTH) < 0.7

    def run(mask_self: bool) -> Tensor:
        out: Tensor = converted(Memory, SymmetricConfig(max_error=1.0, mask_self=mask_self))(x(), seen)
        return out

    assert run(False).shape == (2, 4, WIDTH)
    with pytest.raises(Exception, match="mask_self needs to know"):
        run(True)
