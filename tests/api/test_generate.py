"""Generation with a key-value cache by models that are converted to selective attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from generation import IDS, LENGTH, MASK, PLACES, REAL, stepwise, whole
from rows import rows
from tiny import llama
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicLayer

import attnrewrite
from attnrewrite import AttnRewriteError, SelectiveConfig
from attnrewrite.inference import SelectiveCache, search_budgets

BY_NAME = {family.name: family for family in FAMILIES}


def converted(model: nn.Module, plan: Any = None) -> Any:
    """Convert with votes that matter: large weights, full strength."""
    torch._dynamo.reset()
    for weight in model.parameters():
        weight.data.mul_(4.0 if weight.dim() > 1 else 1.0)
    attnrewrite.convert(model, plan or SelectiveConfig(), example_kwargs={"input_ids": IDS, "use_cache": False})
    for name, weight in model.named_parameters():
        if name.endswith("selective.gamma"):
            weight.data.fill_(1.0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    found = converted(llama())
    found.generation_config.update(eos_token_id=None, pad_token_id=0, max_new_tokens=6)
    return found


STATIC = {"cache_implementation": "static"}
MANNERS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("manner", rows(["greedy", "sampling", "beams"], quick=["beams"]))
def test_tokens_are_those_of_generation_without_a_cache(model: Any, manner: str) -> None:
    settings = {**MANNERS[manner], "output_logits": True, "return_dict_in_generate": True}
    found = []
    for cache in ({"use_cache": False}, {}, STATIC):
        torch.manual_seed(1)
        found.append(model.generate(IDS[:, :9], attention_mask=MASK[:, :9], **settings, **cache))
    expected, *cached = found
    for other in cached:
        assert torch.equal(other.sequences, expected.sequences)
        for a, b in zip(other.logits, expected.logits, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert (type(cached[0].past_key_values), type(cached[1].past_key_values)) == (DynamicCache, StaticCache)


def test_a_prompt_without_padding_in_a_cache_of_fixed_size(model: Any) -> None:
    """transformers gives such a prompt no mask, and only the places of the cache that it fills."""
    settings = {"attention_mask": torch.ones_like(MASK[:, :9]), "do_sample": False, "max_new_tokens": 3}
    found = [model.generate(IDS[:, :9], **settings, **how) for how in ({"use_cache": False}, STATIC)]
    assert torch.equal(*found)


@pytest.mark.parametrize("inner", rows(["eager", "aot_eager"], quick=["eager"]))
def test_votes_are_counted_and_steps_equal_the_whole(inner: Any) -> None:
    model = converted(llama(num_hidden_layers=1))
    limits: Any = {"recompile_limit": 64, "isolate_recompiles": True}
    model.compile(backend=attnrewrite.Backend(inner=inner), **limits)
    expected = whole(model)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 2)):
        assert torch.allclose(stepwise(model, cache, (5, 6, 7, 8, 12)), expected, atol=1e-5)
    attnrewrite.restore(model)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        plain = model(IDS, attention_mask=MASK, position_ids=PLACES).logits[REAL]
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert not any(module._forward_hooks for module in model.modules() if "Attention" in type(module).__name__)


@pytest.mark.parametrize("name", rows(["gemma2", "gpt2", "gpt_neox"], quick=["gemma2"]))
def test_other_families(name: str) -> None:
    """Windows and soft cap, another name of the argument, fused projections."""
    model = converted(build(BY_NAME[name], "eager"))
    given = {"attention_mask": MASK, "use_cache": False}
    given |= {"position_ids": PLACES}
    with torch.no_grad():
        expected = model(IDS, **given).logits[REAL]
    assert torch.allclose(stepwise(model, DynamicCache(config=model.config), (9, 10, 11)), expected, atol=1e-5)


def test_an_encoder_decoder() -> None:
    model = build(BY_NAME["t5"], "eager")
    inputs = BY_NAME["t5"].inputs()
    attnrewrite.convert(model, {"decoder.*.SelfAttention": SelectiveConfig()}, example_kwargs=inputs)
    for name, weight in model.named_parameters():
        if name.endswith("selective.gamma"):
            weight.data.fill_(1.0)
    settings = {"max_new_tokens": 5, "do_sample": False, "decoder_start_token_id": 0, "eos_token_id": None}
    found = [model.generate(inputs["input_ids"], use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*found)


def test_sequences_of_a_cache_are_selected_and_repeated(model: Any) -> None:
    """Every operation of a cache takes the votes along."""
    swapped = torch.tensor([1, 0])
    with torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(3)]
        for cache in caches:
            model(IDS[:, :9], past_key_values=cache)
        expected = model(IDS[:, 9:10], past_key_values=caches[0]).logits
        caches[1].reorder_cache(swapped)
        assert torch.allclose(model(IDS[swapped, 9:10], past_key_values=caches[1]).logits, expected[swapped], atol=1e-6)
        caches[2].batch_repeat_interleave(2)
        caches[2].batch_select_indices(torch.tensor([0, 3]))
        assert torch.allclose(model(IDS[:, 9:10], past_key_values=caches[2]).logits, expected, atol=1e-6)
        caches[2].reset()
        model(IDS[:, :9], past_key_values=caches[2])
        assert torch.allclose(model(IDS[:, 9:10], past_key_values=caches[2]).logits, expected, atol=1e-6)


def test_training_with_the_cache_that_models_make_by_default(model: Any) -> None:
    gradients = []
    for use_cache in (True, False):
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=use_cache).loss.backward()
        gradients.append([x.grad for x in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


class Quantized(DynamicLayer):
    """A layer of another kind."""


def test_a_cache_that_cannot_hold_votes_is_named(model: Any) -> None:
    plain, full, strange = llama(), DynamicCache(config=model.config), DynamicCache(config=model.config)
    plain(IDS, past_key_values=full)
    with pytest.raises(AttnRewriteError, match=r"AR323.*self_attn(.|\n)*did not keep the state"):
        model(IDS[:, :1], past_key_values=full)
    strange.layers[0] = Quantized()
    with pytest.raises(AttnRewriteError, match=r"AR323(.|\n)*Quantized is no DynamicLayer"):
        model(IDS, past_key_values=strange)
    torch._dynamo.reset()
    raw = torch.compile(plain, backend=attnrewrite.Backend(variant=SelectiveConfig(mode="raw"), inner="eager"))
    with pytest.raises(BackendCompilerFailed, match="use_cache=False"), torch.no_grad():
        raw(IDS[:, :3], past_key_values=full)


# --- budgets -------------------------------------------------------------------------------------------


def test_a_budget_of_the_whole_length_changes_no_bit(model: Any) -> None:
    expected = stepwise(model, DynamicCache(config=model.config), (9, 10))
    for budgets in (None, LENGTH, [LENGTH + 5, LENGTH]):
        assert torch.equal(stepwise(model, SelectiveCache(model.config, budgets), (9, 10)), expected)


def test_budgets_bound_the_memory_and_cuts_do_not_matter(model: Any) -> None:
    cache = SelectiveCache(model.config, [6, 9])
    expected = stepwise(model, cache, ())
    assert [layer.keys.shape[2] for layer in cache.layers] == [6, 9]
    slot = 2 * (2 * 2 * 8 * 4 + 4 + 1)  # two sequences; key and value of two heads of 8 floats, votes, a flag
    assert cache.nbytes() == 15 * slot
    again = SelectiveCache(model.config, [6, 9])
    assert torch.allclose(stepwise(model, again, (5, 6, 12, 13)), expected, atol=1e-5)
    assert again.nbytes() == 15 * slot
    assert not torch.allclose(expected, whole(model), atol=1e-2)
    unbounded = SelectiveCache(model.config)
    stepwise(model, unbounded, ())
    assert unbounded.nbytes() == 2 * LENGTH * slot


@pytest.mark.slow
@torch.no_grad()
def test_what_a_cache_of_the_size_of_smollm2_holds() -> None:
    """9 heads of 64 on 3 of keys and values, as in SmolLM2-135M: what is held shrinks with the budget, to the byte."""
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512}
    model, N = converted(llama(num_hidden_layers=2, intermediate_size=1536, **sizes)), 384
    ids = torch.randint(3, 60, (1, N), generator=torch.Generator().manual_seed(0))
    held, logits = [], []
    for budget in (None, N, 32):
        cache = SelectiveCache(model.config, budget)
        logits.append(model(ids, past_key_values=cache).logits)
        held.append(cache.nbytes())
    assert torch.equal(logits[0], logits[1]) and held[0] == held[1] == 2 * N * (2 * 3 * 64 * 4 + 5)
    assert held[2] == held[0] * 32 // N
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    storages = [x.untyped_storage().nbytes() for layer in plain.layers for x in (layer.keys, layer.values)]
    assert held[2] < sum(storages) / 11


def test_generate_with_budgets_and_beams(model: Any) -> None:
    """Beams take what a bounded cache holds along, and never hold more."""
    given = {"attention_mask": MASK[:, :9], "do_sample": False, "num_beams": 2}
    cache = SelectiveCache(model.config, 7)
    found = model.generate(IDS[:, :9], past_key_values=cache, **given)
    assert found.shape == (2, 15)
    assert [layer.keys.shape[:3] for layer in cache.layers] == [(4, 2, 7)] * 2


def test_search_shrinks_what_hurts_least(model: Any) -> None:
    batches = [IDS]
    budgets = search_budgets(model, batches, tolerance=0.05, step=6)
    assert all(budget in (14, 8, 2) for budget in budgets)
    assert search_budgets(model, batches, tolerance=1e9, step=6) == [2, 2]
    with torch.no_grad():
        losses = [
            float(model(IDS, labels=IDS, past_key_values=SelectiveCache(model.config, given)).loss)
            for given in (None, budgets)
        ]
    assert losses[1] <= losses[0] + 0.05


def test_wrong_budgets_are_named(model: Any) -> None:
    for wrong in (0, 1, [8], [8, 1]):
        with pytest.raises(AttnRewriteError, match="AR402"):
            SelectiveCache(model.config, wrong)
    with pytest.raises(AttnRewriteError, match="AR402"):
        search_budgets(model, [IDS, IDS[:, :5]])
    plain = llama()
    with pytest.raises(AttnRewriteError, match="AR323"):
        plain(IDS, past_key_values=SelectiveCache(plain.config, 8))


def test_a_converted_encoder_is_called_by_itself() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.randint(3, 64, (2, 9))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    given = {"decoder_input_ids": ids[:, :4], "use_cache": False}
    attnrewrite.convert(model, attnrewrite.SSAConfig(), example_inputs=(ids,), example_kwargs=given)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    attnrewrite.restore(model)
    assert model.get_encoder()._compiled_call_impl is None
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
