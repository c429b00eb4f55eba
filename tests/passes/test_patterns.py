"""Registered patterns: found in models, proved, rewritten; and what is no attention is refused at registration."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_as_good, exact, run
from torch import Tensor, nn

import attnrewrite
from attnrewrite.errors import AttnRewriteError
from attnrewrite.passes.patterns.registry import PATTERNS
from attnrewrite.passes.report import Report

HEADS, DIM, LENGTH = 4, 8, 9
WIDTH = HEADS * DIM
LOG2E = math.log2(math.e)
Function = Callable[..., Tensor]


def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 * LOG2E)
    e = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def deferred(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
    return (torch.softmax(scores, -1)[..., None] * v[:, :, None]).sum(-2)


def causal_base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 * LOG2E)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(hidden, -math.inf)
    e = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def own_constants(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / torch.sqrt(torch.tensor(float(q.shape[-1]), dtype=q.dtype))
    weights = torch.exp(scores) * torch.ones(scores.shape[-2:], dtype=q.dtype).tril()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def masked_base_two(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 * LOG2E)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask * LOG2E
    e = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5)
    return torch.einsum("bhls,bshe->blhe", weights, v) / weights.sum(-1).transpose(1, 2)[..., None]


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    return base_two(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def examples(kv_heads: int = HEADS, *mask: Tensor) -> tuple[Tensor, ...]:
    """Other sizes than those of the models."""
    q = torch.randn(3, HEADS, 5, 16)
    return q, torch.randn(3, kv_heads, 7, 16), torch.randn(3, kv_heads, 7, 16), *mask


def sequence_examples() -> tuple[Tensor, ...]:
    q = torch.randn(3, 5, HEADS, 16)
    return q, torch.randn(3, 7, HEADS, 16), torch.randn(3, 7, HEADS, 16)


class Model(nn.Module):
    """Two layers that attend through ``function``."""

    def __init__(self, function: Function, kv_heads: int = HEADS, *, layout: str = "bhld") -> None:
        super().__init__()
        self.function, self.layout = function, layout
        self.q, self.o = (nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)) for _ in range(2))
        self.k, self.v = (
            nn.ModuleList(nn.Linear(WIDTH, kv_heads * DIM, bias=False) for _ in range(2)) for _ in range(2)
        )

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        for q, k, v, o in zip(self.q, self.k, self.v, self.o, strict=True):
            heads = [p(x).view(*x.shape[:2], -1, DIM) for p in (q, k, v)]
            heads = heads if self.layout == "blhd" else [h.transpose(1, 2) for h in heads]
            out = self.function(*heads, *mask)
            x = x + o((out if self.layout == "blhd" else out.transpose(1, 2)).flatten(2))
        return x


@pytest.fixture(autouse=True)
def none_registered() -> Iterator[None]:
    assert not PATTERNS
    yield
    PATTERNS.clear()


def compiled(model: nn.Module, **settings: Any) -> tuple[nn.Module, list[Report]]:
    reports: list[Report] = []
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    other.compile(backend=attnrewrite.Backend(inner="eager", strict=True, report=reports.append), **settings)
    return other, reports


def check(model: nn.Module, *mask: Tensor, dtype: torch.dtype = torch.float32) -> Report:
    """Assert values and gradients; return the report."""
    model = model.to(dtype)
    x = torch.randn(2, LENGTH, WIDTH).to(dtype)

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.model(x) if mask is None else self.model(x, mask)

    inputs = {"x": x, **({"mask": mask[0]} if mask else {})}
    ordinary, true = run(Keyword(), inputs), exact(Keyword(), inputs)
    ours, reports = compiled(Keyword())
    found = run(ours, inputs)
    assert_as_good("output", found[0], ordinary[0], true[0])
    for name, gradient in true[1].items():
        assert_as_good(name, found[1][name], ordinary[1][name], gradient)
    return reports[0]


CASES: list[tuple[Function, dict[str, Any], int]] = [
    (base_two, {}, HEADS),
    (deferred, {}, HEADS),
    (products, {}, HEADS),
    (causal_base_two, {"is_causal": True}, HEADS),
    (own_constants, {"is_causal": True}, HEADS),
    (grouped, {}, 2),
    (sequence_first, {"layout": "blhd"}, HEADS),
]


@pytest.mark.parametrize(("function", "settings", "kv_heads"), CASES, ids=[f.__name__ for f, _, _ in CASES])
def test_pattern_is_found_proved_and_rewritten(function: Function, settings: dict[str, Any], kv_heads: int) -> None:
    torch.manual_seed(0)
    layout = settings.get("layout", "bhld")
    model = Model(function, kv_heads, layout=layout)
    before = check(model)
    assert [s for s in before.sites if s.status == "rewritten"] == []
    given = sequence_examples() if layout == "blhd" else examples(kv_heads)
    attnrewrite.register_pattern(function.__name__, function, given, **settings)
    report = check(model)
    assert [s.status for s in report.sites] == ["rewritten"] * 2, report.to_dict()
    assert report.rejections == []
    for site in report.sites:
        assert (site.certificate, site.spelling) == ("proved", [f"pattern {function.__name__}"])
        assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, kv_heads, DIM)
        assert site.scale == pytest.approx(DIM**-0.5)
        assert site.mask.kind == ("causal" if settings.get("is_causal") else "none")
        assert "test_patterns.py:" in site.source


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_patterns_are_read(boolean: bool) -> None:
    torch.manual_seed(0)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = seen if boolean else torch.where(seen, 0.0, torch.finfo(torch.float32).min)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(masked_base_two)
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.model(x, self.mask)
            return out

    attnrewrite.register_pattern("masked", masked_base_two, examples(HEADS, mask[:5, :7]))
    report = check(Causal())
    assert [(s.status, s.mask.kind) for s in report.sites] == [("rewritten", "causal")] * 2


def test_bfloat16_and_dynamic_lengths() -> None:
    torch.manual_seed(0)
    attnrewrite.register_pattern("base two", base_two, examples())
    assert check(Model(base_two), dtype=torch.bfloat16).summary["rewritten"] == 2
    model = Model(causal_base_two)
    attnrewrite.register_pattern("causal", causal_base_two, examples(), is_causal=True)
    ours, reports = compiled(model, dynamic=True)
    for length in (9, 12):
        x = torch.randn(2, length, WIDTH)
        assert torch.allclose(ours(x), model(x), atol=1e-5)
    assert [r.summary["rewritten"] for r in reports] == [2]


def test_export_finds_patterns_and_variants_take_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, WIDTH)
    attnrewrite.register_pattern("causal", causal_base_two, examples(), is_causal=True)
    model = Model(causal_base_two).eval()
    report = attnrewrite.explain(model, x)
    assert [(s.status, s.certificate) for s in report.sites] == [("matched", "proved")] * 2
    expected = model(x)
    attnrewrite.convert(model, attnrewrite.SelectiveConfig(), example_inputs=(x,))
    assert torch.allclose(model(x), expected, atol=1e-5)


def other_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 * LOG2E)
    e = torch.exp2(scores - scores.amax(-2, keepdim=True))
    return (e / e.sum(-2, keepdim=True)) @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    e = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def other_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * (0.7 * LOG2E)
    e = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def other_numerator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 * LOG2E)
    e = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (scores / e.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("mutant", [other_axis, no_scale, other_scale, other_numerator])
def test_mutants_are_not_taken_for_the_pattern(mutant: Function) -> None:
    torch.manual_seed(0)
    attnrewrite.register_pattern("base two", base_two, examples())
    assert [s for s in check(Model(mutant)).sites if s.spelling] == []


def test_missing_scale_is_another_pattern() -> None:
    torch.manual_seed(0)
    attnrewrite.register_pattern("base two", base_two, examples())
    attnrewrite.register_pattern("no scale", no_scale, examples(), scale=math.log(2))
    report = check(Model(no_scale))
    assert [(s.status, s.scale) for s in report.sites] == [("rewritten", pytest.approx(math.log(2)))] * 2


def test_swapped_operands_of_a_sum_are_the_same_pattern() -> None:
    def swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (k[:, :, None] * q[:, :, :, None]).sum(-1) * q.shape[-1] ** -0.5
        return (v[:, :, None] * torch.softmax(scores, -1)[..., None]).sum(3)

    torch.manual_seed(0)
    attnrewrite.register_pattern("products", products, examples())
    assert check(Model(swapped)).summary["rewritten"] == 2


def test_a_width_that_is_written_into_the_pattern_fails_elsewhere() -> None:
    def fixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(q @ k.mT * 0.25)
        return (weights @ v) / weights.sum(-1, keepdim=True)

    torch.manual_seed(0)
    attnrewrite.register_pattern("fixed", fixed, examples())  # 16 ** -0.5; the model's is 8 ** -0.5
    report = check(Model(fixed))
    assert [(s.status, s.rejections[0].code) for s in report.sites] == [("rejected", "AR205")] * 2


def test_what_the_recogniser_sees_stays_its_own() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v

    torch.manual_seed(0)
    attnrewrite.register_pattern("plain", plain, examples())
    report = check(Model(plain))
    assert [s.status for s in report.sites] == ["rewritten"] * 2
    assert "softmax" in report.sites[0].spelling


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v)


def _fails(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise ValueError("no such attention")


def _one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _no_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q, -1) * v.mean()


def _two(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return q @ k.mT, v


HELD = torch.ones(3, 1, 1, 1)


def _own_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return base_two(q * HELD[:1], k, v)


def _by_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return base_two(q, k, v) if q.shape[-1] == 16 else deferred(q, k, v)


def _unsafe_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT / math.sqrt(q.shape[-1]) + mask)
    return (weights @ v) / weights.sum(-1, keepdim=True)


REFUSED: list[tuple[str, Function, tuple[Tensor, ...], dict[str, Any], str]] = [
    ("linear attention", _linear, examples(), {}, "values differ"),
    ("wrong scale", base_two, examples(), {"scale": 1.0}, "values differ"),
    ("wrong flag", base_two, examples(), {"is_causal": True}, "values differ"),
    ("no flag", causal_base_two, examples(), {}, "values differ"),
    ("wrong axis", other_axis, examples(), {}, "differ"),
    ("failing", _fails, examples(), {}, "no such attention"),
    ("one operator", _one, examples(), {}, "one operator"),
    ("no key", _no_key, examples(), {}, "does not"),
    ("own tensor", _own_tensor, examples(), {}, "holds tensors"),
    ("two results", _two, examples(), {}, "one tensor"),
    ("by size", _by_size, examples(), {}, "depend on the sizes"),
    ("empty rows", _unsafe_mask, examples(HEADS, torch.zeros(5, 7)), {}, "hidden"),
    ("flag and mask", masked_base_two, examples(HEADS, torch.zeros(5, 7)), {"is_causal": True}, "not defined"),
    ("layout", base_two, examples(), {"layout": "bld"}, "dims of the query"),
    ("letters", base_two, examples(), {"layout": "esld"}, "positions and features"),
    ("no tensors", base_two, (1, 2, 3), {}, "example_inputs are"),  # type: ignore[list-item]  # refused
    ("ranks", base_two, (torch.ones(2, 3), *examples()[1:]), {}, "one rank"),
]


@pytest.mark.parametrize(
    ("function", "given", "settings", "said"), [x[1:] for x in REFUSED], ids=[x[0] for x in REFUSED]
)
def test_what_is_no_attention_is_refused(function: Function, given: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AttnRewriteError) as raised:
        attnrewrite.register_pattern("it", function, given, **settings)
    assert raised.value.code == "AR208"
    assert said in raised.value.detail
    assert attnrewrite.list_patterns() == []


def test_names_are_taken_once_and_can_be_forgotten() -> None:
    attnrewrite.register_pattern("base two", base_two, examples())
    assert attnrewrite.list_patterns() == ["base two"]
    with pytest.raises(AttnRewriteError, match="AR208"):
        attnrewrite.register_pattern("base two", deferred, examples())
    with pytest.raises(AttnRewriteError, match="did you mean 'base two'"):
        attnrewrite.unregister_pattern("base to")
    attnrewrite.unregister_pattern("base two")
    assert attnrewrite.list_patterns() == []
