"""Keys and values in two blocks: memory, prefixes and global tokens beside the sequence's own."""

from __future__ import annotations

import pytest
import torch
from compiled import HEADS, WIDTH, Attention, compiled_like_eager, rewritten
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.report import Report

MEMORY, LENGTH = 3, 5


class Memory(Attention):
    """Learned keys and values stand before those of the sequence."""

    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.memory_keys, self.memory_values = (nn.Parameter(torch.randn(HEADS, MEMORY, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = self.mask(self.scores(q, k))
        if self.causal:
            own = torch.full((x.shape[1], x.shape[1]), -1e30).triu(1)
            scores = scores + torch.cat([torch.zeros(x.shape[1], MEMORY), own], -1)
        out = self.mixed(torch.softmax(scores, -1), v)
        return self.o(out.transpose(-3, -2).flatten(-2))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([q @ self.memory_keys.mT, q @ k.mT], -1) * 0.5

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights[..., :MEMORY] @ self.memory_values + weights[..., MEMORY:] @ v


class Causal(Memory):
    causal = True


class ScaledBefore(Memory):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([q @ self.memory_keys.mT / 2, (q @ k.mT) * 0.5], -1)


class MemoryBehind(Memory):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([q @ (k / 2).mT, q @ (self.memory_keys * 0.5).mT], -1)

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights[..., -MEMORY:] @ self.memory_values + weights[..., :-MEMORY] @ v


class Split(Memory):
    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        ahead, own = weights.split([MEMORY, v.shape[-2]], -1)
        return ahead @ self.memory_values + own @ v


class KeysJoinedBefore(Memory):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        memory = self.memory_keys.expand(len(k), -1, -1, -1)
        return q @ torch.cat([memory, k], -2).mT * 0.5


class ValuesJoinedBefore(Memory):
    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        memory = self.memory_values.expand(len(v), -1, -1, -1)
        return weights @ torch.cat([memory, v], -2)


class Turned(Memory):
    """Keys and values stand on the left."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([self.memory_keys @ q.mT, k @ q.mT], -2).mT * 0.5

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        turned = weights.mT
        return (self.memory_values.mT @ turned[..., :MEMORY, :] + v.mT @ turned[..., MEMORY:, :]).mT


class NullKey(Memory):
    """One learned key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.memory_keys, self.memory_values = (nn.Parameter(torch.randn(HEADS, 1, 4)) for _ in range(2))

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights[..., :1] @ self.memory_values + weights[..., 1:] @ v


class ComputedSink(NullKey):
    """The learned key has no value."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([q @ self.memory_keys.mT * 0.5, q @ k.mT * 0.5], -1)

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights[..., 1:] @ v


class GlobalTokens(Attention):
    """Blocks of the sequence attend within themselves and to all global tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        first, last = k[:, :, :2], v[:, :, :2]
        q, k, v = (y.unflatten(2, (-1, 3)) for y in (q, k, v))
        scores = torch.cat([torch.einsum("bhnid,bhjd->bhnij", q, first), torch.einsum("bhnid,bhnjd->bhnij", q, k)], -1)
        weights = torch.softmax(scores * 0.5, -1)
        out = torch.einsum("bhnij,bhjd->bhnid", weights[..., :2], last)
        out = out + torch.einsum("bhnij,bhnjd->bhnid", weights[..., 2:], v)
        return self.o(out.flatten(2, 3).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "cls", [Memory, Causal, ScaledBefore, MemoryBehind, Split, KeysJoinedBefore, ValuesJoinedBefore, Turned]
)
def test_blocks_are_joined(cls: type[Memory]) -> None:
    torch.manual_seed(0)
    (site,) = compiled_like_eager(cls(), torch.randn(2, LENGTH, WIDTH))
    assert rewritten([site])
    assert (site.heads, site.query_length, site.key_length, site.scale) == (HEADS, LENGTH, LENGTH + MEMORY, 0.5)
    assert (site.mask.kind, site.mask.offset) == (("causal", MEMORY) if cls is Causal else ("none", None))
    assert site.other_users == [] and "joined blocks" in site.spelling


def test_blocks_of_the_sequence_beside_global_tokens() -> None:
    torch.manual_seed(0)
    (site,) = compiled_like_eager(GlobalTokens(), torch.randn(2, 12, WIDTH))
    assert rewritten([site])
    assert (site.heads, site.query_length, site.key_length) == (HEADS, 3, 5)


def test_one_learned_key_with_a_value_is_a_block_and_without_one_a_sink() -> None:
    torch.manual_seed(0)
    (block,) = compiled_like_eager(NullKey(), torch.randn(2, LENGTH, WIDTH))
    (sink,) = compiled_like_eager(ComputedSink(), torch.randn(2, LENGTH, WIDTH))
    assert rewritten([block]) and (block.key_length, block.sink) == (LENGTH + 1, False)
    assert (sink.status, sink.certificate, sink.key_length, sink.sink) == ("matched", "proved", LENGTH, True)
    assert [(r.code, "differ by query" in r.detail) for r in sink.rejections] == [("AR401", True)]


def test_blocks_of_any_length() -> None:
    model, reports = Memory(), list[Report]()
    torch._dynamo.reset()
    backend = attnrewrite.Backend(inner="aot_eager", strict=True, report=reports.append)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, length in ((2, 5), (3, 4), (4, 9)):
        x = torch.randn(batch, length, WIDTH)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert all(site.status == "rewritten" for report in reports for site in report.sites)


class OtherQueries(Memory):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([(q + 1) @ self.memory_keys.mT, q @ k.mT], -1)


class ScaledDifferently(Memory):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([q @ self.memory_keys.mT * 0.5, q @ k.mT], -1)


class KeysScaledDifferently(Memory):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([q @ (self.memory_keys * 0.5).mT, q @ k.mT], -1)


class MaskedInPart(Memory):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([q @ self.memory_keys.mT, (q @ k.mT).masked_fill(k[..., None, :, 0] > 0, -1e30)], -1)


class CutElsewhere(Memory):
    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        shifted = v[..., 1:, :]
        return weights[..., :MEMORY] @ self.memory_values + weights[..., MEMORY + 1 :] @ shifted


class OtherSizes(Memory):
    """Four values for the memory of three keys."""

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        longer = torch.cat([self.memory_values, self.memory_values[:, :1]], 1)
        return weights[..., : MEMORY + 1] @ longer + weights[..., MEMORY + 1 :] @ v[..., 1:, :]


class Overlapping(Memory):
    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        own = torch.cat([v[..., :1, :], v], -2)
        return weights[..., :MEMORY] @ self.memory_values + weights[..., MEMORY - 1 :] @ own


class Weighted(Memory):
    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        return torch.add(weights[..., :MEMORY] @ self.memory_values, weights[..., MEMORY:] @ v, alpha=2)


class Gated(Memory):
    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        return (weights[..., :MEMORY] * v[..., :1].sigmoid()) @ self.memory_values + weights[..., MEMORY:] @ v


REFUSED = [OtherQueries, ScaledDifferently, KeysScaledDifferently, MaskedInPart, CutElsewhere, OtherSizes, Overlapping]


@pytest.mark.parametrize("cls", [*REFUSED, Weighted, Gated])
def test_blocks_that_make_no_one_attention_are_refused(cls: type[Memory]) -> None:
    torch.manual_seed(0)
    (site,) = compiled_like_eager(cls(), torch.randn(2, LENGTH, WIDTH))
    (row,) = site.rejections
    assert (site.status, row.code) == ("rejected", "AR203")
    assert "test_joined_blocks.py:" in row.source and row.nearest
