"""Assisted generation: the cache of a converted model takes tokens back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from tiny import llama
from transformers import DynamicCache

import attnrewrite
from attnrewrite import AttnRewriteError, SEAConfig, SelectiveConfig, VariantConfig
from attnrewrite.conversion import new_parameters
from attnrewrite.inference import SelectiveCache, as_assistant
from attnrewrite.inference.layers import LONGEST_DRAFT, DynamicStateLayer

BY_NAME = {family.name: family for family in FAMILIES}
IDS = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "use_cache": False}
MODES: Any = ["gate", "new-head"]


SEA = SEAConfig(slices=8, budget=2, max_length=96)


def converted(model: Any, config: VariantConfig) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data.mul_(4.0 if weight.dim() > 1 else 1.0)
    attnrewrite.convert(model, config, example_kwargs=INPUTS)
    with torch.no_grad():
        for name, weight in new_parameters(model):
            if config.variant == "selective" or "scales" in name:
                weight.normal_(std=0.5) if weight.dim() else weight.fill_(1.0)
    return model


KINDS: Any = [*map(SelectiveConfig, MODES), pytest.param(SEA, marks=pytest.mark.slow)]


@pytest.fixture(params=KINDS, ids=[*MODES, "sea"], scope="module")
def model(request: Any) -> Any:
    return converted(llama(num_hidden_layers=1), request.param)


@torch.no_grad()
def test_tokens_taken_back_leave_no_trace(model: Any) -> None:
    """Votes are held as they were, and sums are computed back."""
    kept, draft = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(IDS[:, :9], past_key_values=kept)
    model(IDS[:, :9], past_key_values=draft)
    model(IDS[:, 9:12], past_key_values=kept)
    model(torch.cat((IDS[:, 9:12], IDS[:, :4]), 1), past_key_values=draft)
    draft.crop(-3)
    draft.crop(-1)
    for ours, theirs in zip(draft.layers, kept.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        for mine, other in ((ours.state, theirs.state), (ours.summary, theirs.summary)):
            assert mine.keys() == other.keys()
            for name, held in other.items():
                assert torch.allclose(mine[name].float(), held.float(), rtol=1e-4, atol=1e-4)
    again = [model(IDS[:, 12:14], past_key_values=cache).logits for cache in (draft, kept)]
    assert torch.allclose(*again, atol=1e-4)


def repeating() -> torch.Tensor:
    """A prompt in which what follows can be looked up."""
    return torch.cat((IDS[:, :8], IDS[:, :8], IDS[:, :5]), 1)


SETTINGS: Any = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("name", "how", "config"),
    [
        ("llama", "lookup", SelectiveConfig("new-head")),
        ("llama", "assistant", SelectiveConfig("new-head")),
        ("llama", "lookup", SEA),
        pytest.param("llama", "assistant", SEA, marks=pytest.mark.slow),
        pytest.param("gemma2", "lookup", SelectiveConfig("new-head"), marks=pytest.mark.slow),
    ],
    ids=lambda x: x.variant if isinstance(x, VariantConfig) else x,
)
def test_greedy_tokens_are_those_without_assistance(name: str, how: str, config: VariantConfig) -> None:
    """With full and with sliding layers, whose window is passed; the assistant is often wrong."""
    model = converted(llama(num_hidden_layers=1) if name == "llama" else build(BY_NAME[name], "eager"), config).double()
    plain = model.generate(repeating(), **SETTINGS)
    help_: dict[str, Any] = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": llama()}
    assert torch.equal(model.generate(repeating(), **SETTINGS, **help_), plain)


def cropped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many tokens caches take back."""
    found: list[int] = []
    take_back = DynamicStateLayer.crop

    def crop(layer: Any, count: int) -> None:
        found.append(-count)
        take_back(layer, count)

    monkeypatch.setattr(DynamicStateLayer, "crop", crop)
    return found


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", SelectiveConfig("gate")),
        pytest.param("gemma2", SelectiveConfig("gate"), marks=pytest.mark.slow),
        pytest.param("llama", SEA, marks=pytest.mark.slow),
    ],
    ids=["llama", "gemma2", "sea"],
)
def test_a_converted_model_drafts_for_another(name: str, config: VariantConfig, monkeypatch: Any) -> None:
    """What it drafts after tokens were taken back is what it drafts from an empty cache."""
    model = converted(llama(num_hidden_layers=1) if name == "llama" else build(BY_NAME[name], "eager"), config).double()
    other = llama(num_hidden_layers=1, vocab_size=model.config.vocab_size).double()
    source = torch.Generator().manual_seed(2)
    for weight in other.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=source), alpha=0.1 if weight.dim() > 1 else 0.0)
    plain = other.generate(repeating(), **SETTINGS)
    model.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
    with pytest.raises(AttnRewriteError, match=r"AR323(.|\n)*as_assistant"):
        other.generate(repeating(), assistant_model=model, **SETTINGS)
    found = cropped(monkeypatch)
    assert as_assistant(model) is model
    assert torch.equal(other.generate(repeating(), assistant_model=model, **SETTINGS), plain)
    assert max(found) > 1
    drafter, start = DynamicCache(config=model.config), IDS[:, :9]
    drafter.activate_past_recording()
    with torch.no_grad():
        model(start, past_key_values=drafter)
        for token in range(9, 14):
            model(IDS[:, token : token + 1], past_key_values=drafter)
        drafter.crop(-4)
        logits = model(IDS[:, 3:5], past_key_values=drafter).logits
        expected = model(torch.cat((IDS[:, :10], IDS[:, 3:5]), 1), use_cache=False).logits[:, -2:]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_only_a_converted_model_is_prepared_as_an_assistant() -> None:
    with pytest.raises(AttnRewriteError, match="AR310"):
        as_assistant(llama())


@torch.no_grad()
def test_what_cannot_be_taken_back_is_named(model: Any) -> None:
    for length, count, known in ((6, 6, 5), (1, 1, 0), (LONGEST_DRAFT + 9, LONGEST_DRAFT, LONGEST_DRAFT - 1)):
        cache = DynamicCache(config=model.config)
        model(IDS[:, :3], past_key_values=cache)
        model(IDS.repeat(1, 4)[:, :length], past_key_values=cache)
        with pytest.raises(AttnRewriteError, match=rf"AR323(.|\n)*{count} tokens(.|\n)*of {known}"):
            cache.crop(-count)
        assert cache.get_seq_length() == 3 + length
        if known:
            cache.crop(-known)
            assert cache.get_seq_length() == 3 + length - known


@torch.no_grad()
def test_what_a_budget_evicted_is_not_taken_back() -> None:
    model = converted(llama(num_hidden_layers=1), SelectiveConfig("gate"))
    bounded = SelectiveCache(model.config, 12)
    model(IDS, past_key_values=bounded)
    with pytest.raises(AttnRewriteError, match="AR323"):
        bounded.crop(-1)
    assert not bounded.is_croppable
