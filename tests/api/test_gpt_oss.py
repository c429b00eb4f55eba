"""GPT-OSS, whose heads have sinks and whose layers alternate a window with full attention, as a user has it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from generation import IDS, LENGTH, MASK, stepwise, whole
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attnrewrite
from attnrewrite import (
    AttnRewriteError,
    RoutingConfig,
    SEAConfig,
    SelectiveConfig,
    SelectiveSSAConfig,
    SSAConfig,
    SymmetricConfig,
    VariantConfig,
    functional,
)
from attnrewrite.conversion import new_parameters
from attnrewrite.distances import distance
from attnrewrite.observation import Observed, outputs_observed

FAMILY = next(family for family in FAMILIES if family.name == "gpt_oss")
CONFIGS = [
    SelectiveConfig(),
    SelectiveConfig("new-head"),
    SSAConfig(),
    SelectiveSSAConfig(),
    SymmetricConfig(max_error=1),
]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def name_of(config: VariantConfig) -> str:
    return f"{config.variant}-{config.to_dict().get('mode', '')}"


def made(config: VariantConfig) -> Any:
    """A model in float64 whose new parameters matter."""
    torch._dynamo.reset()
    model: Any = build(FAMILY, "eager").double()
    attnrewrite.convert(model, config, example_kwargs={"input_ids": IDS, "use_cache": False}).double()
    with torch.no_grad():
        for _, weight in new_parameters(model):
            weight.fill_(0.5) if weight.dim() == 0 else weight.normal_(std=0.5)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, max_new_tokens=5)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_generation_with_a_cache_and_training(config: VariantConfig) -> None:
    model = made(config)
    expected = whole(model)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 2)):
        torch.testing.assert_close(stepwise(model, cache, (5, 9, 10)), expected, **CLOSE)
    prompt, settings = IDS[:, :9], {"attention_mask": MASK[:, :9], "do_sample": False}
    caches: list[dict[str, Any]] = [{"use_cache": False}, {}, {"cache_implementation": "static"}]
    plain, *others = (model.generate(prompt, **settings, **how) for how in caches)
    assert all(torch.equal(other, plain) for other in others)
    model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss.backward()
    sinks = [weight.grad for name, weight in model.named_parameters() if name.endswith("sinks")]
    assert len(sinks) == 2
    assert all(by is not None and bool((by != 0).all()) for by in sinks)


def by_operator(at: Observed) -> Tensor:
    """Compute what a layer gives with the functional operator."""
    t, facts = at.tensors, at.site.visibility.facts
    scale = {"scale": at.site.scores.alpha, "enable_gqa": True, "window": facts.window, "is_causal": True}
    given = {**scale, "attn_mask": t.padding(), "sinks": t.values[sink_of(at)]}
    tensors = (t.query(), t.key(), t.value())
    if at.request.variant == "selective":
        return functional.selective_attention(*tensors, gamma=t.extra["gamma"], **given)
    from attnrewrite.passes.rules.ssa import _temperatures

    return functional.ssa_attention(*tensors, *_temperatures(t, at.request), **given)


def sink_of(at: Observed) -> Any:
    (node,) = [node for node, value in at.tensors.values.items() if isinstance(value, Tensor) and value.shape == (4,)]
    return node


@pytest.mark.parametrize("config", [SelectiveConfig(), SSAConfig()], ids=name_of)
def test_layers_are_the_functional_operators(config: VariantConfig) -> None:
    model, pairs = made(config), list[tuple[Tensor, Tensor]]()

    def see(at: Observed) -> None:
        assert at.output is not None
        pairs.append((at.output, by_operator(at)))

    inputs = {"input_ids": IDS, "attention_mask": MASK}
    list(outputs_observed(model, [inputs], see, converted=True))
    assert len(pairs) == 2
    for found, true in pairs:
        torch.testing.assert_close(found, true, **CLOSE)


def test_the_teachers_attention_has_its_sinks() -> None:
    """SSA begins as the layer itself, so that any distance would be that of a sink left out."""
    teacher = build(FAMILY, "eager").double()
    inputs = {"input_ids": IDS, "use_cache": False}
    model = attnrewrite.convert(copy.deepcopy(teacher), SSAConfig(), example_kwargs=inputs).double()
    found = distance(model, teacher, [inputs])
    assert max(x for row in found.layers for x in (*row.maps, *row.outputs)) < 1e-12


@pytest.mark.parametrize(
    "config", [RoutingConfig(clusters=2, window_size=4), SEAConfig(strict_window=False)], ids=name_of
)
def test_variants_without_sinks_say_so(config: VariantConfig) -> None:
    model = build(FAMILY, "eager")
    with pytest.raises(AttnRewriteError, match="sink") as caught:
        attnrewrite.convert(model, config, example_kwargs=FAMILY.inputs())
    assert caught.value.code == "AR401"
