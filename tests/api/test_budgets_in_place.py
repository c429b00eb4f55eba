"""Budgets of tokens where places count: sliding layers, a window that the cache does not know, biases by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from generation import IDS, LENGTH, stepwise, whole
from rows import rows
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import attnrewrite
from attnrewrite import SelectiveConfig
from attnrewrite.inference import SelectiveCache, search_budgets

WINDOW, BUDGET = 6, 4
WIDE = {"vocab_size": 64, "hidden_size": 32}


def mistral() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(
        MistralConfig(**WIDE, **heads, intermediate_size=48, num_hidden_layers=1, sliding_window=WINDOW)
    )


def bloom() -> nn.Module:
    return BloomForCausalLM(BloomConfig(**WIDE, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2))


def gpt_neo() -> nn.Module:
    rates = {"attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPTNeoForCausalLM(GPTNeoConfig(**WIDE, **rates, **kinds, **ends, num_layers=2, num_heads=4))


def voting(model: Any, plan: Any, inputs: dict[str, Any]) -> Any:
    """Convert with votes that matter: large weights, full strength."""
    torch._dynamo.reset()
    for weight in model.eval().parameters():
        weight.data.mul_(4.0 if weight.dim() > 1 else 1.0)
    attnrewrite.convert(model, plan, example_kwargs=inputs)
    for name, weight in model.named_parameters():
        if name.endswith("selective.gamma"):
            weight.data.fill_(1.0)
    return model


def made(build_: Any) -> Any:
    torch.manual_seed(0)
    return voting(build_(), SelectiveConfig(), {"input_ids": IDS, "use_cache": False})


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("build_", rows([mistral, bloom, gpt_neo], quick=[mistral]))
def test_a_call_of_all_equals_steps(build_: Any) -> None:
    model, in_place = made(build_), {"in_place": build_ is not mistral}
    enough, held = (WINDOW, WINDOW - 1) if build_ is mistral else (LENGTH, LENGTH)
    cache = SelectiveCache(model.config, enough, **in_place)
    expected = whole(model)
    torch.testing.assert_close(stepwise(model, cache, (9,)), expected, rtol=1e-4, atol=1e-5)
    assert lengths(cache) == [held] * len(cache.layers)
    caches = [SelectiveCache(model.config, BUDGET, **in_place) for _ in range(2)]
    once, cut = (stepwise(model, cache, cuts) for cache, cuts in zip(caches, ((), (9, 13)), strict=True))
    torch.testing.assert_close(cut, once, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(once, expected, atol=1e-2)
    for cache in caches:
        assert lengths(cache) == [BUDGET] * len(cache.layers)


def test_a_cache_that_gives_no_places_is_refused() -> None:
    model = made(bloom)
    with pytest.raises(BackendCompilerFailed, match=r"AR307(.|\n)*a bias needs the places(.|\n)*in_place=True"):
        model(IDS, past_key_values=SelectiveCache(model.config, BUDGET))


def test_search_begins_at_the_window_and_beams_take_places_along() -> None:
    model = made(mistral)
    assert search_budgets(model, [IDS], step=40) == [WINDOW]
    assert search_budgets(model, [IDS], tolerance=1e9, step=4) == [2]
    cache = SelectiveCache(model.config, [BUDGET])
    settings = {"num_beams": 2, "do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(IDS[:, :9], past_key_values=cache, **settings).shape == (2, 12)
    assert [layer.keys.shape[:3] for layer in cache.layers] == [(4, 2, BUDGET)]


@pytest.mark.slow
def test_relative_bias_of_an_encoder_decoder() -> None:
    t5 = next(family for family in FAMILIES if family.name == "t5")
    inputs = t5.inputs()
    model = voting(build(t5, "eager"), {"decoder.*.SelfAttention": SelectiveConfig()}, inputs)
    given = {"input_ids": inputs["input_ids"]}
    found = []
    with torch.no_grad():
        for cuts in ((), (9, 13)):
            cache = EncoderDecoderCache(SelectiveCache(model.config, BUDGET, in_place=True), DynamicCache())
            out, start = [], 0
            for stop in (*cuts, LENGTH):
                out.append(model(**given, decoder_input_ids=IDS[:, start:stop], past_key_values=cache).logits)
                start = stop
            assert lengths(cache.self_attention_cache) == [BUDGET] * 2
            found.append(torch.cat(out, 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
