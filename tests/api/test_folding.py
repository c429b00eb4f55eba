"""SSA's temperatures in the value cache: steps equal the whole, and no other layer takes such values for its own."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from generation import IDS, LENGTH, MASK, PLACES, stepwise, whole
from rows import rows
from tiny import llama
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import attnrewrite
from attnrewrite import AttnRewriteError, SelectiveSSAConfig, SSAConfig, VariantConfig
from attnrewrite.compiled import compile_in_place
from attnrewrite.conversion import new_parameters
from attnrewrite.inference import SelectiveCache
from attnrewrite.inference.layers import StateLayer

INPUTS = {"input_ids": IDS, "attention_mask": MASK, "position_ids": PLACES, "use_cache": False}
SETTINGS: Any = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
SIGMOID = SSAConfig(gate="full", position="sigmoid")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def converted(model: Any, config: VariantConfig, inputs: dict[str, Any], targets: str = "*") -> Any:
    torch._dynamo.reset()
    for weight in model.double().parameters():
        weight.data.mul_(4.0 if weight.dim() > 1 else 1.0)
    attnrewrite.convert(model, config, example_kwargs=inputs, targets=targets).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in new_parameters(model):
            weight.normal_(std=0.5, generator=generator) if weight.dim() else weight.fill_(0.3)
    return model


@functools.cache
def _made(name: str, config: VariantConfig) -> Any:
    if name == "llama":
        return converted(llama(num_hidden_layers=1), config, INPUTS)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    sliding = MistralConfig(vocab_size=96, num_hidden_layers=1, sliding_window=4, **sizes)
    return converted(MistralForCausalLM(sliding).eval(), config, INPUTS)


def made(name: str, config: VariantConfig) -> Any:
    torch._dynamo.reset()
    model = copy.deepcopy(_made(name, config))
    compile_in_place(model)
    return model


FOLDED = [
    ("llama", SSAConfig()),
    ("llama", SIGMOID),
    ("llama", SSAConfig(gate="shared", on="value")),
    ("sliding", SSAConfig()),
    ("llama", SelectiveSSAConfig()),
]


@pytest.mark.parametrize(("name", "config"), rows(FOLDED, quick=FOLDED[:1]))
def test_pieces_equal_the_whole(name: str, config: VariantConfig) -> None:
    """Beside padding on the left; in a window of four, which keys leave that still count."""
    model = made(name, config)
    expected = whole(model)
    caches: list[Any] = [DynamicCache(config=model.config)]
    if name == "llama":
        caches.append(StaticCache(config=model.config, max_cache_len=LENGTH + 2))
    if config.variant == "selective_ssa":
        caches.append(SelectiveCache(model.config, LENGTH))
    for cache in caches:
        torch.testing.assert_close(stepwise(model, cache, (5, 9, 11)), expected, **CLOSE)
        assert isinstance(cache.layers[0], StateLayer)


def test_the_cache_holds_values_times_their_temperatures() -> None:
    """With the gains of n alone: that of the n-th real token times 1 + 0.3 ln n."""
    model = made("llama", SSAConfig(parts="position"))
    plain = attnrewrite.restore(copy.deepcopy(model))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for one, cache in zip((model, plain), caches, strict=True):
            for part in (slice(0, 9), slice(9, 10)):
                given = {"attention_mask": MASK[:, : part.stop], "position_ids": PLACES[:, part]}
                one(IDS[:, part], past_key_values=cache, **given)
    n = MASK.cumsum(-1)[:, None, :10, None].clamp(min=1)
    folded, values = (cache.layers[0].values for cache in caches)
    assert torch.allclose(folded, values * (1 + 0.3 * n.double().log()), rtol=1e-12)


SAMPLING = {"do_sample": True, "temperature": 2.0}


@pytest.mark.parametrize("manner", rows([{}, SAMPLING, {"num_beams": 3}], quick=[{"num_beams": 3}]))
def test_tokens_are_those_of_generation_without_a_cache(manner: dict[str, Any]) -> None:
    model, found = made("llama", SSAConfig()), []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(1)
        found.append(model.generate(IDS[:, :9], attention_mask=MASK[:, :9], **SETTINGS, **manner, **cache))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_tokens_are_taken_back(name: str) -> None:
    """Also in a window, from which drafts push keys that are needed again."""
    model = made(name, SSAConfig())
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        expected = model(IDS[:, :10], use_cache=False).logits[:, 9:]
        model(IDS[:, :9], past_key_values=cache)
        cache.crop(0)
        model(IDS[:, 10:13], past_key_values=cache)
        cache.crop(-3)
        torch.testing.assert_close(model(IDS[:, 9:10], past_key_values=cache).logits, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_assisted_generation(name: str) -> None:
    repeating = torch.cat((IDS[:1, :6], IDS[:1, :6], IDS[:1, :4]), 1)
    model, given = made(name, SSAConfig()), {"attention_mask": torch.ones_like(repeating), **SETTINGS}
    drafted = model.generate(repeating, prompt_lookup_num_tokens=3, **given)
    assert torch.equal(drafted, model.generate(repeating, use_cache=False, **given))


def test_gradients_go_through_the_cache() -> None:
    """Those of a loss over a sequence as a whole, without a cache, and in two pieces."""
    model, gradients = made("llama", SSAConfig()), []
    for cuts, use_cache in (((LENGTH,), False), ((LENGTH,), True), ((8, LENGTH), True)):
        model.zero_grad()
        cache = DynamicCache(config=model.config) if use_cache else None
        start, total = 0, torch.zeros(())
        for stop in cuts:
            out = model(IDS[:, start:stop], past_key_values=cache, use_cache=use_cache)
            start, total = stop, total + out.logits.square().mean(-1).sum()
        total.backward()
        gradients.append([x.grad for x in model.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-7, atol=1e-9)


def test_compiled() -> None:
    model = made("llama", SSAConfig())
    expected = whole(model)
    limits: Any = {"recompile_limit": 64, "isolate_recompiles": True}
    model.compile(backend=attnrewrite.Backend(inner="aot_eager"), **limits)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH)):
        torch.testing.assert_close(stepwise(model, cache, (12, 13)), expected, **CLOSE)


def test_a_cache_that_others_filled_holds_values_as_they_are() -> None:
    """Before the conversion; then temperatures are computed at each step, except where keys have left a window."""
    plain, cache = llama(num_hidden_layers=1).double(), DynamicCache()
    model = made("llama", SSAConfig())
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if "ssa" not in name})
    with torch.no_grad():
        plain(IDS[:, :9], past_key_values=cache)
        found = model(IDS[:, 9:], past_key_values=cache).logits
        expected = model(IDS, use_cache=False).logits[:, 9:]
    torch.testing.assert_close(found, expected, **CLOSE)

    sliding = made("sliding", SSAConfig())
    cache = DynamicCache(config=sliding.config)
    with torch.no_grad():
        attnrewrite.restore(copy.deepcopy(sliding))(IDS, past_key_values=cache)
        with pytest.raises(AttnRewriteError, match=r"AR323(.|\n)*did not keep the state"):
            sliding(IDS[:, :1], past_key_values=cache)


def test_no_other_layer_takes_the_values_for_its_own() -> None:
    model = made("llama", SSAConfig())
    both = made("llama", SelectiveSSAConfig())
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH)):
        with torch.no_grad():
            model(IDS[:, :9], past_key_values=cache)
            with pytest.raises(AttnRewriteError, match=r"AR323(.|\n)*the state of ssa"):
                both(IDS[:, 9:], past_key_values=cache)
            plain = attnrewrite.restore(copy.deepcopy(model))
            with pytest.raises(AttnRewriteError, match=r"AR323(.|\n)*filled by a converted layer"):
                plain(IDS[:, 9:], past_key_values=cache)


def test_cross_attention_keeps_the_encoders_values_as_they_are() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6], "attention_mask": MASK, "use_cache": False}
    model = converted(
        T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).eval(), SSAConfig(), inputs, "decoder.*"
    )
    given = {"attention_mask": MASK, "decoder_start_token_id": 3, **SETTINGS}
    expected = model.generate(IDS, use_cache=False, **given)
    found = model.generate(IDS, return_dict_in_generate=True, **given)
    assert torch.equal(found.sequences, expected)
    assert isinstance(found.past_key_values.self_attention_cache.layers[0], StateLayer)
    assert not isinstance(found.past_key_values.cross_attention_cache.layers[0], StateLayer)
