"""The commitment loss of routing layers: its value, its gradient, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routing_conversion_support import IDS, SETTINGS, inputs_of, routed
from tiny import llama
from torch import Tensor

import attnrewrite
from attnrewrite import AttnRewriteError, RoutingConfig, SSAConfig


def test_the_loss_is_the_distance_to_the_own_centroid_and_draws_the_projections() -> None:
    """Computed here from the inputs of both layers, with one sequence padded on the left."""
    model = routed("llama", RoutingConfig(**SETTINGS, routing_heads=(1, 2, 3)), padding=True)
    inputs, seen = inputs_of("llama", padding=True), list[Tensor]()
    layers = model.model.layers
    handles = [layer.input_layernorm.register_forward_hook(lambda *given: seen.append(given[2])) for layer in layers]
    output, loss = next(attnrewrite.with_commitment(model, [inputs], beta=0.5))
    for handle in handles:
        handle.remove()
    expected = sum(
        _distance(layer.self_attn, x, inputs["attention_mask"].bool()) for layer, x in zip(layers, seen, strict=True)
    )
    torch.testing.assert_close(loss, 0.5 * expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=1e-10, atol=1e-10)
    model.zero_grad()
    loss.backward()
    assert all(float(p.weight.grad.abs().sum()) > 0 for a in layers for p in (a.self_attn.q_proj, a.self_attn.k_proj))
    assert layers[1].self_attn.v_proj.weight.grad is None
    assert not layers[0].self_attn.routing.centroids.requires_grad


def _distance(layer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Return the mean square of r - mu[cl(r)] over queries plus that over keys, of KV heads 0 and 1."""
    total = torch.zeros((), dtype=x.dtype)
    for project, heads, center in (
        (layer.q_proj, ((1, 0), (2, 1), (3, 1)), "center_query"),
        (layer.k_proj, ((0, 0), (1, 1)), "center_key"),
    ):
        squares = []
        for head, own in heads:
            states = project(x).unflatten(-1, (-1, 8))[:, :, head] - layer.routing.get_buffer(center)[own]
            states = states - states.mean(-1, keepdim=True)
            r = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            mu = layer.routing.centroids[own]
            squares.append((r - mu[(r @ mu.mT).argmax(-1)]).square()[real])
        total = total + torch.stack(squares).mean()
    return total


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
