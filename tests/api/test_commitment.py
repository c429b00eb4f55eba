"""The commitment loss of routing layers: its value, its gradient, and what is refused."""

from __future__ import annotations

import pytest
import torch
from routing_conversion_support import IDS, SETTINGS, inputs_of, routed
from tiny import llama
from torch import Tensor

import attnrewrite
from attnrewrite import AttnRewriteError, RoutingConfig, SSAConfig


def test_the_loss_is_the_distance_to_the_own_centroid_and_draws_the_projections() -> None:
    """Of two layers; the first one's is computed here from its input, with one sequence padded on the left."""
    config = RoutingConfig(**SETTINGS, routing_heads=(1, 2, 3))
    model = routed("llama", config, padding=True)
    inputs = inputs_of("llama", padding=True)
    layer, seen = model.model.layers[0].self_attn, list[Tensor]()
    handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda *given: seen.append(given[2]))
    output, loss = next(attnrewrite.with_commitment(model, [inputs], beta=0.5))
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=1e-10, atol=1e-10)
    real = inputs["attention_mask"].bool()
    mu, total = layer.routing.centroids, 0.0
    for project, heads, center in (
        (layer.q_proj, ((1, 0), (2, 1), (3, 1)), "center_query"),
        (layer.k_proj, ((0, 0), (1, 1)), "center_key"),
    ):
        squares = []
        for head, own in heads:
            x = project(seen[0]).unflatten(-1, (-1, 8))[:, :, head] - layer.routing.get_buffer(center)[own]
            x = x - x.mean(-1, keepdim=True)
            r = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            nearest = (r @ mu[own].mT).argmax(-1)
            squares.append((r - mu[own][nearest]).square()[real])
        total += 0.5 * float(torch.stack(squares).mean())
    model.model.layers[1].self_attn.routing.centroids.zero_()  # the second layer's loss is then the mean square of r
    model.zero_grad()
    second = float(next(attnrewrite.with_commitment(model, [inputs], beta=0.5))[1]) - total
    assert second == pytest.approx(1.0, rel=1e-4)  # queries and keys, of mean square 1
    loss.backward()
    assert all(float(p.weight.grad.abs().sum()) > 0 for p in (layer.q_proj, layer.k_proj))
    assert model.model.layers[1].self_attn.v_proj.weight.grad is None
    assert not mu.requires_grad


def test_a_training_loop_moves_queries_and_keys_towards_the_centroids() -> None:
    model = routed("llama").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for output, loss in attnrewrite.with_commitment(model, [{"input_ids": IDS, "labels": IDS, "use_cache": False}] * 6):
        optimizer.zero_grad()
        (1e4 * loss + 0.0 * output.loss).backward()
        optimizer.step()
        attnrewrite.update(model)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert int(model.model.layers[0].self_attn.routing.steps) == 6


def test_models_without_routing_are_named() -> None:
    model = llama()
    with pytest.raises(AttnRewriteError, match="AR310"):
        attnrewrite.with_commitment(model, [IDS])
    attnrewrite.convert(model, SSAConfig(), example_kwargs={"input_ids": IDS, "use_cache": False})
    with pytest.raises(AttnRewriteError, match=r"AR102(.|\n)*no layer of LlamaForCausalLM"):
        attnrewrite.with_commitment(model, [IDS])
