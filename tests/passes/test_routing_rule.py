"""The rule of routing attention: what is routed, how heads are split, and which options reach the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spellings import WIDTH, FoldedHeads, GroupedEinsum, NanoGPT
from torch import Tensor, nn

import attnrewrite
from attnrewrite import AttnRewriteError, RoutingConfig
from attnrewrite.functional import routing_attention
from attnrewrite.kernels.routing.learn import routing_learn
from attnrewrite.kernels.routing.mass import captured, met_pairs, near_pairs
from attnrewrite.kernels.routing.prepare import Options, Routed
from attnrewrite.variants.centroids import Centroids

X = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Bidirectional(NanoGPT):
    """NanoGPT that sees everything."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.c_attn(x))
        return self.c_proj(joined(torch.softmax(q @ k.mT / 8**0.5, -1) @ v))


class Biased(nn.Module):
    """A learned bias per head and pair."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(4, 13, 13))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.c_attn(x))
        return joined(torch.softmax(q @ k.mT / 8**0.5 + self.bias, -1) @ v)


class Crossed(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, (k, v) = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2), split(self.kv(y), 2)
        return joined(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)


def split(x: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
    return tuple(y.unflatten(-1, (4, 8)).transpose(1, 2) for y in x.chunk(parts, -1))


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def routed(model: nn.Module, config: RoutingConfig, *inputs: Tensor) -> Centroids:
    model.double().eval()
    attnrewrite.convert(model, config, example_inputs=inputs)
    attnrewrite.calibrate(model, [inputs])
    return next(module.double() for module in model.modules() if isinstance(module, Centroids))


OPTIONS: list[tuple[type[NanoGPT], dict[str, Any], dict[str, Any]]] = [
    (NanoGPT, {}, {"rule": "argmax_window"}),
    (NanoGPT, {"shared_qk": True, "logits": "normed", "temperature": 1.0}, {"rule": "argmax_window"}),
    (NanoGPT, {"rule": "topw", "paper_causal": True, "window_size": None}, {}),
    (Bidirectional, {"logits": "normed"}, {"rule": "topw"}),
    (Bidirectional, {"rule": "argmax_window", "shared_qk": True}, {}),
]


@pytest.mark.parametrize(
    ("kind", "fields", "chosen"), OPTIONS, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_a_converted_layer_is_the_operator_on_its_projections(
    kind: type[NanoGPT], fields: dict[str, Any], chosen: dict[str, Any]
) -> None:
    """With the centroids and centers of its calibration, values and gradients."""
    model = kind()
    fields = {"clusters": 3, "window_size": 4, **fields}
    holder = routed(model, RoutingConfig(**fields), X)
    arguments = {**fields, **chosen, "is_causal": kind is NanoGPT, "scale": fields.get("temperature")}
    for name in ("clusters", "temperature"):
        arguments.pop(name, None)
    arguments |= {"center_query": holder.center_query, "centroids": holder.centroids}
    if not fields.get("shared_qk"):
        arguments["center_key"] = holder.center_key
        assert float(holder.center_key.abs().min()) > 0
    expected = model.c_proj(joined(routing_attention(*split(model.c_attn(X)), **arguments)))
    found = model(X)
    assert torch.allclose(found, expected, **CLOSE)
    weight = torch.randn_like(found)
    theirs, ours = (torch.autograd.grad((out * weight).sum(), model.c_attn.weight)[0] for out in (expected, found))
    assert torch.allclose(ours, theirs, **CLOSE)


def test_heads_of_a_group_route_by_the_centroids_of_their_key_head() -> None:
    """Heads 0 and 3 of two groups route; 1 attends near keys, 2 stays. All against formulas by hand."""
    model = GroupedEinsum()
    config = RoutingConfig(3, 4, routing_heads=(0, 3), local_heads=(1,), local_window=3)
    holder = routed(model, config, X)
    q = model.q(X).unflatten(-1, (4, 8)).transpose(1, 2)
    k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1) for y in (model.k(X), model.v(X)))
    logits = q @ k.mT / 8**0.5
    lag = torch.arange(13)[:, None] - torch.arange(13)
    logits[:, 1] = logits[:, 1].masked_fill(lag.abs() >= 3, float("-inf"))
    expected = logits.softmax(-1) @ v
    for head, own in ((0, 0), (3, 1)):
        one = slice(head, head + 1)
        state = {name: getattr(holder, name)[own : own + 1] for name in ("centroids", "center_query", "center_key")}
        expected[:, one] = routing_attention(q[:, one], k[:, one], v[:, one], rule="topw", window_size=4, **state)
    assert torch.allclose(model(X), expected.transpose(1, 2).reshape(2, 13, WIDTH), **CLOSE)


def test_a_bias_is_learned() -> None:
    model = Biased()
    holder = routed(model, RoutingConfig(3, 4), X)
    state = {name: getattr(holder, name) for name in ("centroids", "center_query", "center_key")}
    expected = joined(
        routing_attention(*split(model.c_attn(X)), attn_mask=model.bias, rule="topw", window_size=4, **state)
    )
    found = model(X)
    assert torch.allclose(found, expected, **CLOSE)
    weight = torch.randn_like(found)
    theirs, ours = (torch.autograd.grad((out * weight).sum(), model.bias)[0] for out in (expected, found))
    assert float(theirs.abs().max()) > 0
    assert torch.allclose(ours, theirs, **CLOSE)


def test_layouts_do_not_matter() -> None:
    model = FoldedHeads()
    holder = routed(model, RoutingConfig(3, 4), X)
    q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (model.q(X), model.k(X), model.v(X)))
    state = {name: getattr(holder, name) for name in ("centroids", "center_query", "center_key")}
    expected = model.o(joined(routing_attention(q, k, v, window_size=4, is_causal=True, **state)))
    assert torch.allclose(model(X), expected, **CLOSE)


def test_cross_attention_takes_the_papers_rule_by_name() -> None:
    model, y = Crossed(), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    host = model.double()(X, y)
    for config in (RoutingConfig(), RoutingConfig(rule="topw", shared_qk=True)):
        with pytest.raises(AttnRewriteError, match="cross-attention takes rule='topw'"):
            attnrewrite.convert(model, config, example_inputs=(X, y))
    routed(model, RoutingConfig(1, 64, rule="topw"), X, y)
    assert torch.allclose(model(X, y), host, **CLOSE)
    assert model.train()(X, y).requires_grad


def test_dropout_is_on_the_weights_within_clusters() -> None:
    model = NanoGPT(dropout=0.5)
    routed(model, RoutingConfig(1, 64), X)
    whole = model(X)
    model.train()
    drawn = torch.stack([model(X) for _ in range(200)])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.allclose(drawn.mean(0), whole, atol=0.15)


def test_a_mask_per_query_and_centroids_of_another_layer_are_refused() -> None:
    class Odd(NanoGPT):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.rand(1, 1, 64, 64) > 0.5

    with pytest.raises(AttnRewriteError, match="membership of a cluster has no query"):
        attnrewrite.convert(Odd(), RoutingConfig(), example_inputs=(X.float(),))
    model = NanoGPT()
    routed(model, RoutingConfig(3, 4), X)
    model.routing = Centroids(2, 3, 8).double()
    with pytest.raises(Exception, match="AR309"):
        model(X)


def test_captured_mass_by_hand() -> None:
    """Two clusters on one axis: tokens 0 and 2 meet, 1 and 3 meet, under uniform causal weights."""
    side = torch.tensor([1.0, -1.0, 1.0, -1.0])
    states = torch.stack([side, -side], -1)[None, None]
    centroids = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])
    met = met_pairs(Routed(states, states, states, centroids), Options(is_causal=True, window_size=4))
    assert met[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    weights = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    near = near_pairs(4, 4, 1, is_causal=True)
    found = captured(weights[None, None], met, near, torch.tensor([[True, True, True, False]]))
    assert found.routing.item() == pytest.approx(1 + 1 / 2 + 2 / 3)
    assert found.local.item() == pytest.approx(1 + 1 / 2 + 1 / 3)
    assert found.random.item() == pytest.approx(1 + 1 / 2 + 1 / 3 + 2 / 3 * 1 / 2)
    assert found.queries.item() == 3


def test_heads_of_uneven_groups_and_padding_learn_what_they_route() -> None:
    """Query heads 0, 1 of the first centroid set and 2 of the second; padded tokens count nowhere."""
    holder = Centroids(2, 2, 4)
    source = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4, generator=source), torch.randn(2, 2, 5, 4, generator=source)
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    query[1, :, 0] = float("nan")
    buffers = dict(holder.named_buffers())
    names = ("centroids", "ema_count", "ema_sum", "steps", "step_count", "step_sum", "lonely", "lonely_affinity")
    centers = (buffers["center_query"], buffers["center_key"])
    for _ in range(2):
        routing_learn(query, key, *centers, *(buffers[n] for n in names), [0, 0, 1], 0, valid, valid)
    assert holder.ready
    assert holder.ema_count.sum(1).tolist() == holder.step_count.sum(1).tolist() == [24, 16]
    assert torch.allclose(holder.step_sum, holder.step_sum.nan_to_num(0.0))
