"""Generation with a key-value cache by models that are converted to routing attention or SEA: equal to that without."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from generation import IDS, LENGTH, MASK, PLACES, stepwise, whole
from rows import rows
from tiny import llama
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

import attnrewrite
from attnrewrite import AttnRewriteError, RoutingConfig, SEAConfig, VariantConfig
from attnrewrite.conversion import compile_in_place, new_parameters

ROUTING = RoutingConfig(clusters=3, window_size=3)
SPLIT = RoutingConfig(clusters=3, window_size=2, routing_heads=(1, 2), local_heads=(0,), local_window=3)
SHARED = RoutingConfig(clusters=3, window_size=3, shared_qk=True)
NORMED = RoutingConfig(clusters=3, window_size=3, logits="normed")
SEA = SEAConfig(slices=8, budget=2, max_length=64)
CASES = {
    "routing": ("llama", ROUTING),
    "split heads": ("llama", SPLIT),
    "shared": ("gpt2", SHARED),
    "normed": ("gpt2", NORMED),
    "gpt2 routing": ("gpt2", ROUTING),
    "sea": ("llama", SEA),
    "gpt2 sea": ("gpt2", SEA),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@functools.cache
def _made(name: str, config: VariantConfig, layers: int) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        rates = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, **rates)).double().eval()
    else:
        model = llama(num_hidden_layers=layers).double()
    for weight in model.parameters():
        weight.data.mul_(4.0 if weight.dim() > 1 else 1.0)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "position_ids": PLACES, "use_cache": False}
    attnrewrite.convert(model, config, example_kwargs=inputs)
    model.double()
    with torch.no_grad():
        for key, parameter in new_parameters(model):
            if "scales" in key:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    if config.variant == "routing":
        attnrewrite.calibrate(model, [inputs])
    model.generation_config.update(eos_token_id=None, pad_token_id=0, max_new_tokens=5)
    return model


def made(name: str, config: VariantConfig, layers: int = 1) -> Any:
    """A tiny model in float64, converted; made once and copied."""
    torch._dynamo.reset()
    model = copy.deepcopy(_made(name, config, layers))
    compile_in_place(model)
    return model


def caches(model: Any) -> list[Any]:
    return [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 2)]


@pytest.mark.parametrize("case", rows(CASES, quick=("split heads", "shared", "sea")))
def test_pieces_equal_the_whole(case: str) -> None:
    """Prefill in chunks, then steps, beside padding on the left."""
    model = made(*CASES[case])
    expected = whole(model)
    for cache in caches(model):
        torch.testing.assert_close(stepwise(model, cache, (5, 9, 10, 11, 12)), expected, **CLOSE)
    attnrewrite.restore(model)
    assert not torch.allclose(whole(model), expected)


@pytest.fixture(scope="module", params=["routing", "sea"])
def model(request: pytest.FixtureRequest) -> Any:
    return made(*CASES[request.param], layers=2)


MANNERS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("manner", rows(MANNERS, quick=("beams",)))
@pytest.mark.parametrize("padded", rows([True, False], quick=[True]))
def test_tokens_are_those_of_generation_without_a_cache(model: Any, padded: bool, manner: str) -> None:
    """Unpadded, transformers passes position ids and no mask: of one document."""
    mask = MASK[:, :9] if padded else torch.ones_like(MASK[:, :9])
    settings = {**MANNERS[manner], "output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    found = []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(1)
        found.append(model.generate(IDS[:, :9], **settings, **cache))
    expected, *cached = found
    for other in cached:
        assert torch.equal(other.sequences, expected.sequences)
        for a, b in zip(other.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    assert (type(cached[0].past_key_values), type(cached[1].past_key_values)) == (DynamicCache, StaticCache)


@pytest.mark.parametrize("case", ["routing", "sea"])
def test_compiled(case: str) -> None:
    model = made(*CASES[case])
    expected = whole(model)
    limits: Any = {"recompile_limit": 64, "isolate_recompiles": True}
    model.compile(backend=attnrewrite.Backend(inner="aot_eager"), **limits)
    for cache in caches(model):
        torch.testing.assert_close(stepwise(model, cache, (12, 13)), expected, **CLOSE)


@pytest.mark.parametrize("case", ["shared", "sea"])
def test_sequences_of_a_cache_are_selected_and_repeated(case: str) -> None:
    model, swapped = made(*CASES[case]), torch.tensor([1, 0])
    with torch.no_grad():
        held = [DynamicCache(config=model.config) for _ in range(3)]
        for cache in held:
            model(IDS[:, :9], past_key_values=cache)
        expected = model(IDS[:, 9:10], past_key_values=held[0]).logits
        held[1].reorder_cache(swapped)
        found = model(IDS[swapped, 9:10], past_key_values=held[1]).logits
        torch.testing.assert_close(found, expected[swapped], **CLOSE)
        held[2].batch_repeat_interleave(2)
        held[2].batch_select_indices(torch.tensor([0, 3]))
        torch.testing.assert_close(model(IDS[:, 9:10], past_key_values=held[2]).logits, expected, **CLOSE)
        held[2].reset()
        model(IDS[:, :9], past_key_values=held[2])
        torch.testing.assert_close(model(IDS[:, 9:10], past_key_values=held[2]).logits, expected, **CLOSE)


@pytest.mark.parametrize("case", ["routing", "shared", "sea"])
def test_training_with_the_cache_that_models_make_by_default(case: str) -> None:
    model, gradients = made(*CASES[case]), []
    for use_cache in (True, False):
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=use_cache).loss.backward()
        gradients.append([x.grad for x in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", rows(["routing", "shared", "normed", "sea"], quick=["shared", "sea"]))
def test_gradients_go_through_the_cache(case: str) -> None:
    """A loss over a sequence in two pieces has the gradients of the whole."""
    model, gradients = made(*CASES[case]), []
    for cuts in ((LENGTH,), (8, LENGTH)):
        model.zero_grad()
        cache, start, total = DynamicCache(config=model.config), 0, torch.zeros(())
        for stop in cuts:
            total = total + model(IDS[:, start:stop], past_key_values=cache).logits.square().mean(-1).sum()
            start = stop
        total.backward()
        gradients.append([x.grad for x in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_routing_cache_takes_tokens_back() -> None:
    model = made("llama", ROUTING)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(IDS[:, :9], past_key_values=cache)
        expected = model(IDS[:, 9:10], past_key_values=copy.deepcopy(cache)).logits
        model(IDS[:, 10:13], past_key_values=cache)
        cache.crop(-3)
        torch.testing.assert_close(model(IDS[:, 9:10], past_key_values=cache).logits, expected, **CLOSE)
    settings = {"attention_mask": torch.ones_like(IDS[:1]), "do_sample": False}
    drafted = model.generate(IDS[:1], prompt_lookup_num_tokens=2, **settings)
    assert torch.equal(drafted, model.generate(IDS[:1], use_cache=False, **settings))


def test_a_window_that_follows_the_length_is_refused_when_tokens_follow() -> None:
    model = made("llama", RoutingConfig(clusters=3))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(IDS, past_key_values=cache)
        with pytest.raises(BackendCompilerFailed, match=r"AR307(.|\n)*window_size is None"):
            model(IDS[:, :1], past_key_values=cache)


def test_several_documents_are_refused_when_they_come() -> None:
    model = made("llama", SEA)
    ids, places = IDS[:, :12], torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, position_ids=places, use_cache=False).logits, expected, **CLOSE)
        with pytest.raises(AttnRewriteError, match=r"AR307(.|\n)*several packed documents"):
            model(ids, position_ids=places.remainder(7), use_cache=False)
