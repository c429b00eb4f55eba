"""Every operator in plain torch: equal to the operator in float64, and as MLIR, executed, to 1e-5."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mlir_runner import Program
from torch import Tensor
from torch.export import Dim

import attnrewrite
from attnrewrite import AttnRewriteError
from attnrewrite.kernels.decompositions import decompositions
from attnrewrite.kernels.largest import among_largest
from attnrewrite.kernels.sdpa.decomposition import scaled_dot_product_attention

B, H, HKV, D, DV = 2, 4, 2, 4, 3
TABLE = decompositions()
READY = "attnrewrite.routing_ready.default"
DOCUMENT = "attnrewrite.sea_one_document.default"
NAMES = sorted({str(operator) for operator in TABLE} - {READY, DOCUMENT})
"""The attentions; beside them there are two operators that only check."""
NO_PART_OF_INFERENCE = (
    *("attnrewrite::enter", "_backward", "routing_learn", "selective_decode", "sea_decode", "selective_memory"),
    *("dense_attention", "selective_kernels", "symmetric_kernels"),
)
"""Markers, gradients, centroids that follow the data, a loss, decoding with a cache, and kernels: not in a program."""
VISIBLE = [(True, None), (True, 3), (False, None)]


class Drawn:
    """Tensors of a fixed seed, for length L."""

    def __init__(self, L: int, dtype: torch.dtype = torch.float64) -> None:
        self.random, self.dtype, self.L = torch.Generator().manual_seed(L), dtype, L

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def query(self) -> Tensor:
        return self(B, H, self.L, D)

    def key(self) -> Tensor:
        return self(B, HKV, self.L, D)

    def value(self) -> Tensor:
        return self(B, HKV, self.L, DV)

    def masks(self) -> list[Tensor | None]:
        """None, padding on the left, a bias, and a bias that is padding."""
        real = torch.arange(self.L) >= torch.tensor([[0], [self.L // 3]])
        real = real[:, None, None]
        hidden = torch.where(real, self(B, 1, 1, self.L), float("-inf"))
        return [None, real, self(1, H, self.L, self.L), hidden]


def operator(name: str) -> Any:
    return next(found for found in TABLE if str(found) == name)


def cases(name: str, L: int) -> list[tuple[Any, ...]]:
    """Arguments of one operator, in all its modes."""
    draw = Drawn(L)
    found: list[tuple[Any, ...]] = []
    for mask, (causal, window) in itertools.product(draw.masks(), VISIBLE):
        q, k, v = draw.query(), draw.key(), draw.value()
        none, added = (None, None), (draw(H), draw(H).abs())  # sinks and slopes
        how = (mask, None, 0.5, 0.0, causal, window)
        match name.split(".")[1]:
            case "selective_attention":
                gamma = torch.tensor(0.7, dtype=torch.float64)
                for cap, first, more in ((None, True, none), (2.0, False, added)):
                    found.append((q, k, v, gamma, *how, cap, 1, first, None, None, *more))
            case "ssa_attention":
                warmth = (draw(B, H, L), draw(B, HKV, L))
                found += [(q, k, v, *warmth, *how, cap, *more) for cap, more in ((None, none), (2.0, added))]
            case "symmetric_attention":
                found.append((k, v, draw(H, D, D), *how, 2.0, True, *added))
                if mask is None or mask.shape[1] == 1:
                    found.append((k, v, None, *how, None, False, *none))
            case "routing_attention":
                found += _routing(draw, (q, k, v), mask, causal, window)
            case "sea_attention":
                found += _sea(draw, (q, k, v), mask, causal, window)
    return found


def _routing(draw: Drawn, qkv: tuple[Tensor, ...], mask: Any, causal: bool, window: int | None) -> list[Any]:
    found: list[Any] = []
    for rule, w, shared in itertools.product(("argmax_window", "topw"), (None, 1, 3), (False, True)):
        q, k, v = (qkv[0], qkv[0], draw(B, H, draw.L, DV)) if shared else qkv
        groups = k.shape[1]
        centers = (draw(groups, D), None if shared else draw(groups, D))
        logits = "normed" if w == 3 else "raw"
        options = (rule, w, shared, logits, causal, None, window, True)
        found.append((q, k, v, draw(groups, 3, D), mask, *centers, *[None] * 5, *options))
    return found


def _sea(draw: Drawn, qkv: tuple[Tensor, ...], mask: Any, causal: bool, window: int | None) -> list[Any]:
    found = []
    rules = itertools.product(((1, 2), (3, 1), (8, 5)), ("exact", "paper"), ("causal_per_batch", "per_query"))
    for (M, budget), counting, grouping in rules:
        estimated = draw(B, H, draw.L, M)
        estimated = estimated.round() if M == 3 else estimated  # ties
        factors = (torch.sigmoid(draw(B, H, draw.L)), torch.sigmoid(draw(B, H, draw.L))) if M != 1 else (None, None)
        found.append((*qkv, estimated, mask, causal, None, window, budget, counting, grouping, *factors))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("L", [1, 2, 7])
def test_computes_what_the_operator_computes(name: str, L: int) -> None:
    whole = operator(name)
    for arguments in cases(name, L):
        ours, theirs = TABLE[whole](*arguments), whole(*arguments)
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_every_operator_of_an_inference_graph_has_one() -> None:
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("attnrewrite::")]
    needed = [name for name in ours if not any(part in name for part in NO_PART_OF_INFERENCE)]
    assert {f"attnrewrite.{name.partition('::')[2]}.default" for name in needed} == {*NAMES, READY, DOCUMENT}


def test_the_check_of_centroids_returns_them() -> None:
    centroids = torch.randn(2, 3, D)
    ready = torch.ops.attnrewrite.routing_ready.default
    for steps in (0, 5):
        assert torch.equal(TABLE[ready](centroids, torch.tensor(steps)), ready(centroids, torch.tensor(steps)))


def test_the_check_of_documents_returns_the_features_or_nothing() -> None:
    features, documents = torch.randn(3, D), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    one = torch.ops.attnrewrite.sea_one_document.default
    assert torch.equal(TABLE[one](features, documents), one(features, documents))
    documents[1, 0, 4, 0] = False
    assert TABLE[one](features, documents).isnan().all()
    with pytest.raises(AttnRewriteError, match="AR307"):
        one(features, documents)


def test_routing_with_a_cache() -> None:
    """Keys whose clusters are known, in a cache that ends with the queries' or has a fixed size."""
    draw, L, S = Drawn(9), 3, 9
    whole = operator("attnrewrite.routing_attention.default")
    for shared, normed, window, place in itertools.product((False, True), (False, True), (None, 3), (None, 4)):
        heads = H if shared else HKV
        position = None if place is None else torch.tensor(place)
        cluster = torch.randint(4, (B, heads, S), generator=draw.random)  # of 3 clusters; the last is padding
        valid = torch.rand(B, S, generator=draw.random) > 0.2
        tensors = (draw(B, H, L, D), draw(B, heads, S, D), draw(B, heads, S, DV), draw(heads, 3, D), None)
        centers = (draw(heads, D), None if shared else draw(heads, D), None, None)
        logits = "normed" if normed else "raw"
        options = ("argmax_window", 2, shared, logits, True, None, window, False)
        given = (*tensors, *centers, valid, cluster, position, *options)
        torch.testing.assert_close(TABLE[whole](*given), whole(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays(name: str) -> None:
    whole = operator(name)
    for arguments in cases(name, 5)[::7]:
        low = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
        assert TABLE[whole](*low).dtype == torch.bfloat16


def test_among_largest_is_a_stable_sort() -> None:
    scores = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).round()
    scores[3, 4] = float("nan")
    scores[5] = float("-inf")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    for count in range(1, 10):
        expected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[:, :count], True)
        assert torch.equal(among_largest(scores, torch.tensor([count])), expected)


@pytest.mark.parametrize("masked", [None, "bool", "added"])
def test_fused_attention(masked: str | None) -> None:
    draw = Drawn(7)
    mask = None if masked is None else draw(B, 1, 7, 7) > 0
    if masked == "added":
        assert mask is not None
        mask = torch.where(mask, draw(B, 1, 7, 7), float("-inf"))
    given = {"attn_mask": mask, "is_causal": masked is None, "scale": 0.3, "enable_gqa": True}
    q, k, v = draw.query(), draw.key(), draw.value()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **given)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **given), expected)


# --- as MLIR ---


class Call(torch.nn.Module):
    """One operator with its options; the tensors are inputs."""

    def __init__(self, name: str, *options: Any) -> None:
        super().__init__()
        self.operator, self.options = operator(name), options

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.operator(*tensors, *self.options)


def tensors(name: str, L: int) -> tuple[Tensor, ...]:
    draw = Drawn(L, torch.float32)
    q, k, v = draw.query(), draw.key(), draw.value()
    padding = torch.arange(L) >= torch.tensor([0, 2])[:, None, None, None]
    match name.split(".")[1]:
        case "selective_attention":
            return q, k, v, draw(1)[0], padding
        case "ssa_attention":
            return q, k, v, draw(B, H, L), draw(B, HKV, L), padding
        case "symmetric_attention":
            return k, v, draw(H, D, D), padding
        case "routing_attention":
            return q, k, v, draw(HKV, 3, D), padding
    return q, k, v, draw(B, H, L, 4), padding


ONE = {
    "attnrewrite.selective_attention.default": [(None, 0.5, 0.0, True, None, None, 1, True)],
    "attnrewrite.ssa_attention.default": [(None, 0.5, 0.0, True, None, None, None, None)],
    "attnrewrite.symmetric_attention.default": [(None, 0.5, 0.0, False, None, None, True, None, None)],
    "attnrewrite.routing_attention.default": [
        (*[None] * 7, "argmax_window", 3, False, "raw", True, None, None, False),
        (*[None] * 7, "topw", None, False, "normed", False, None, None, False),
    ],
    "attnrewrite.sea_attention.default": [
        (True, None, None, 2, "exact", "causal_per_batch", None, None),
        (False, None, None, 2, "exact", "per_query", None, None),
    ],
}


def _executed() -> list[Any]:
    """One mode of every operator, and the others as slow tests."""
    marks: list[Any] = [(), pytest.mark.slow]
    return [
        pytest.param(name, options, marks=mark)
        for name in NAMES
        for options, mark in zip(ONE[name], marks, strict=False)
    ]


@pytest.mark.parametrize(("name", "options"), _executed())
def test_executed_as_linalg_at_other_lengths(name: str, options: tuple[Any, ...], tmp_path: Path) -> None:
    layer, L = Call(name, *options), Dim("L", min=2, max=64)
    given = tensors(name, 7)
    shapes = tuple({axis: L for axis, size in enumerate(x.shape) if size == 7} or None for x in given)
    file = attnrewrite.export(layer, given, tmp_path / "op.mlir", "mlir-linalg", dynamic_shapes=(shapes,))
    program = Program(file)
    for length in (7, 10):
        other = tensors(name, length)
        torch.testing.assert_close(program(*other)[0], layer(*other), rtol=1e-5, atol=1e-5)
