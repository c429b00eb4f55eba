"""Projections, biases, caches and uses of attentions written by hand: what a config does not name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from handmade import WIDTH, B, Change, D, H, L, Layer, halves, made, only
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnrewrite.passes.facts.provenance import Provenance
from attnrewrite.passes.report import Projection


def _slopes() -> Tensor:
    return 0.5 ** torch.arange(1.0, H + 1)[:, None, None]


def _distance() -> Tensor:
    return torch.arange(L)[None, :] - torch.arange(L)[:, None]


@pytest.mark.parametrize(
    ("bias", "kind", "trainable"),
    [
        (lambda layer, s: _slopes() * _distance(), "alibi", False),
        (lambda layer, s: -_slopes() * _distance().abs(), "alibi", False),
        (lambda layer, s: _slopes() * torch.arange(L), "alibi", False),
        (lambda layer, s: _slopes() * _distance() ** 2, "static", False),
        (lambda layer, s: _slopes() * _distance().clamp(-2, 2), "static", False),
        (lambda layer, s: layer.table[:, _distance() + L - 1], "relative", True),
        (lambda layer, s: layer.dense, "static", True),
        (lambda layer, s: s.mean(-2, keepdim=True), "data", True),
    ],
)
def test_biases(bias: Change, kind: str, trainable: bool) -> None:
    site = only(Layer(scores=lambda layer, s: s + bias(layer, s)))
    assert [(b.kind, b.trainable) for b in site.bias] == [(kind, trainable)]


def test_a_bias_from_an_input_is_data() -> None:
    class Given(Layer):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            self.change_scores = lambda layer, s: s + bias
            return super().forward(x)

    site = only(Given(), torch.randn(B, L, WIDTH), torch.randn(H, L, L))
    assert [(b.kind, b.trainable, b.shape) for b in site.bias] == [("data", False, [H, L, L])]


class Fused(Layer):
    def __init__(self, parts: int) -> None:
        super().__init__()
        self.qkv, self.parts = nn.Linear(WIDTH, parts * WIDTH), parts

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.heads(y) for y in self.qkv(x).chunk(self.parts, -1)]
        return self.attend(halves(self, parts[0]), halves(self, parts[-2]), parts[-1])


def test_fused_projections() -> None:
    three, two = only(Fused(3)), only(Fused(2))
    assert made(three, "query") == Projection(["qkv"], ["qkv.weight"], fused=True)
    assert made(three, "key") == made(three, "query")
    assert (made(two, "query").shared, made(two, "key").shared, made(two, "value").shared) == (True, True, False)


def test_a_weight_for_queries_and_keys_is_shared() -> None:
    model = Layer()
    model.k = model.q
    shared = only(model)
    assert (made(shared, "query").shared, made(shared, "value").shared) == (True, False)
    model = Layer()
    model.k.weight = model.q.weight
    assert made(only(model), "key").shared


@torch.library.custom_op("factstest::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def test_a_custom_operator_is_opaque() -> None:
    class Custom(Layer):
        def forward(self, x: Tensor) -> Tensor:
            q = self.heads(project(x, self.q.weight))
            return self.attend(q, self.heads(self.k(x)), self.heads(self.v(x)))

    site = only(Custom())
    assert (made(site, "query").opaque, made(site, "key").opaque) == (True, False)
    assert made(site, "query").weights == ["q.weight"]


@pytest.mark.parametrize("weights", [False, True])
def test_one_weight_for_all_three(weights: bool) -> None:
    class Multi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, H, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.attn(x, y, y, need_weights=weights)

    x, y = torch.randn(B, L, WIDTH), torch.randn(B, 5, WIDTH)
    site = only(Multi(), x, y)
    assert (site.cross, site.other_users) == (True, ["probs"] if weights else [])
    assert made(site, "query") == Projection(["attn"], ["attn.in_proj_weight"])
    assert made(site, "key") == Projection(["attn"], ["attn.in_proj_weight"], fused=True)


def test_an_adapter_is_part_of_the_projection() -> None:
    class Adapted(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x) + 2 * self.up(self.down(x))
            return self.attend(self.heads(q), self.heads(self.k(x)), self.heads(self.v(x)))

    site = only(Adapted())
    assert (made(site, "query").weights, site.cross) == (["q.weight", "up.weight"], False)


def test_raw_inputs_have_no_projection() -> None:
    class Raw(Layer):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attend(self.heads(q), self.heads(k), self.heads(v))

    site = only(Raw(), *(torch.randn(B, L, WIDTH) for _ in range(3)))
    assert (made(site, "query"), site.cross, site.rope, site.cache) == (Projection(), None, "none", "none")


def test_two_sequences() -> None:
    class Cross(Layer):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attend(self.heads(self.q(x)), self.heads(self.k(y)), self.heads(self.v(y)))

    class Pooled(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = F.avg_pool1d(x.mT, 2).mT
            return self.attend(self.heads(self.q(x)), self.heads(self.k(y)), self.heads(self.v(y)))

    class Latent(Layer):
        def forward(self, x: Tensor) -> Tensor:
            q = self.dense[None].expand(x.shape[0], -1, -1, -1)[..., :1] * torch.ones(D)
            return self.attend(q, self.heads(self.k(x)), self.heads(self.v(x)))

    assert only(Latent()).cross is True
    assert only(Cross(), torch.randn(B, L, WIDTH), torch.randn(B, 5, WIDTH)).cross is True
    assert only(Pooled()).cross is False


def test_a_cache_in_a_buffer() -> None:
    class Cached(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(B, H, 16, D))
            self.register_buffer("values", torch.zeros(B, H, 16, D))

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            self.keys[:, :, at] = self.heads(self.k(x))
            self.values[:, :, at] = self.heads(self.v(x))
            return self.attend(self.heads(self.q(x)), self.keys, self.values)

    site = only(Cached(), torch.randn(B, L, WIDTH), torch.arange(L))
    assert (site.cache, made(site, "key").modules, site.cross) == ("index_copy", ["k"], False)


def test_a_past_that_is_joined() -> None:
    class Past(Layer):
        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Any:
            k, v = torch.cat((k, self.heads(self.k(x))), 2), torch.cat((v, self.heads(self.v(x))), 2)
            return self.attend(self.heads(self.q(x)), k, v), k, v

    site = only(Past(), torch.randn(B, 1, WIDTH), torch.randn(B, H, 5, D), torch.randn(B, H, 5, D))
    assert (site.cache, site.other_users, site.cross) == ("cat", ["key", "value"], False)


def test_scores_and_weights_that_are_used_again() -> None:
    class Returning(Layer):
        def forward(self, x: Tensor) -> Any:
            scores = self.heads(self.q(x)) @ self.heads(self.k(x)).mT
            probs = scores.softmax(-1)
            return self.o((probs @ self.heads(self.v(x))).transpose(1, 2).flatten(2)), scores, probs.mean(1)

    assert only(Returning()).other_users == ["scores", "probs"]
    assert only(Layer(scores=lambda layer, s: s - s.amax(-1, keepdim=True))).other_users == []


def test_precision_of_the_softmax() -> None:
    class Half(Layer):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            probs = F.softmax(q @ k.mT * D**-0.5, -1, dtype=torch.float32).to(q.dtype)
            return self.o((probs @ v).transpose(1, 2).flatten(2))

    x = torch.randn(B, L, WIDTH, dtype=torch.bfloat16)
    site, plain = only(Half().bfloat16(), x), only(Layer().bfloat16(), x)
    assert (site.dtype, site.softmax_dtype) == ("bfloat16", "float32")
    assert plain.softmax_dtype == "bfloat16"


def test_inside_a_checkpoint() -> None:
    class Saved(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    site = only(Saved(halves, scores=lambda layer, s: s + _slopes() * _distance()))
    assert (site.rope, site.cross, [b.kind for b in site.bias]) == ("half", False, ["alibi"])
    assert made(site, "query") == Projection(["q"], ["q.weight"])


def test_what_cannot_be_read_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> Any:
        raise RuntimeError

    for name in ("trail", "inputs"):
        monkeypatch.setattr(Provenance, name, fail)
    site = only(Layer(scores=lambda layer, s: s + layer.dense))
    assert (site.rope, site.rope_dims, site.qk_norm, site.cross, site.cache) == (None,) * 5
    assert site.projections == {"query": None, "key": None, "value": None}
    assert [(b.kind, b.trainable) for b in site.bias] == [(None, None)]


class Grouped(Layer):
    """Two key heads for four query heads; nothing behind the values tells what the heads are."""

    def __init__(self, tiled: bool) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)
        self.o, self.tiled = nn.Linear(D, D), tiled

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, D)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = halves(self, self.heads(self.q(x))), halves(self, self.heads(self.k(x))), self.heads(self.v(x))
        k, v = (y.repeat(1, 2, 1, 1) if self.tiled else y.repeat_interleave(2, 1) for y in (k, v))
        hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
        return self.o(((q @ k.mT).masked_fill(hidden, -1e30).softmax(-1) @ v).sigmoid()).amax(1)


@pytest.mark.parametrize("tiled", [True, False])
def test_groups_of_heads_are_told_by_the_queries(tiled: bool) -> None:
    site = only(Grouped(tiled))
    assert (site.heads, site.kv_heads, site.query_length, site.key_length) == (H, 2, L, L)
    assert (site.mask.kind, site.certificate) == ("causal", "proved")
