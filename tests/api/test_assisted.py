"""Assisted generation: the cache of a converted model takes tokens back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from tiny import llama
from transformers import DynamicCache

import attnrewrite
from attnrewrite import AttnRewriteError, SelectiveConfig
from attnrewrite.conversion import new_parameters
from attnrewrite.inference import SelectiveCache
from attnrewrite.inference.layers import LONGEST_DRAFT

BY_NAME = {family.name: family for family in FAMILIES}
IDS = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "use_cache": False}
MODES: Any = ["gate", "new-head"]


def converted(model: Any, mode: Any) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data.mul_(4.0 if weight.dim() > 1 else 1.0)
    attnrewrite.convert(model, SelectiveConfig(mode), example_kwargs=INPUTS)
    with torch.no_grad():
        for _, weight in new_parameters(model):
            weight.normal_(std=0.5) if weight.dim() else weight.fill_(1.0)
    return model


@pytest.fixture(params=MODES, scope="module")
def model(request: Any) -> Any:
    return converted(llama(num_hidden_layers=1), request.param)


@torch.no_grad()
def test_tokens_taken_back_leave_no_trace(model: Any) -> None:
    """To the bit: state is held as it was, not computed back."""
    kept, draft = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(IDS[:, :9], past_key_values=kept)
    model(IDS[:, :9], past_key_values=draft)
    model(IDS[:, 9:12], past_key_values=kept)
    model(torch.cat((IDS[:, 9:12], IDS[:, :4]), 1), past_key_values=draft)
    draft.crop(-3)
    draft.crop(-1)
    for ours, theirs in zip(draft.layers, kept.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        for name, held in theirs.state.items():
            assert torch.allclose(ours.state[name].float(), held.float(), atol=1e-5)
    again = [model(IDS[:, 12:14], past_key_values=cache).logits for cache in (draft, kept)]
    assert torch.allclose(*again, atol=1e-5)


def repeating() -> torch.Tensor:
    """A prompt in which what follows can be looked up."""
    return torch.cat((IDS[:, :8], IDS[:, :8], IDS[:, :5]), 1)


@pytest.mark.parametrize(
    ("name", "how"),
    [("llama", "lookup"), ("llama", "assistant"), pytest.param("gemma2", "lookup", marks=pytest.mark.slow)],
)
def test_greedy_tokens_are_those_without_assistance(name: str, how: str) -> None:
    """With full and with sliding layers, whose window is passed; the assistant is often wrong."""
    model = converted(llama(num_hidden_layers=1) if name == "llama" else build(BY_NAME[name], "eager"), "new-head")
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(repeating(), **settings)
    help_: dict[str, Any] = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": llama()}
    assert torch.equal(model.generate(repeating(), **settings, **help_), plain)


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
    bounded = SelectiveCache(model.config, 12)
    model(IDS, past_key_values=bounded)
    with pytest.raises(AttnRewriteError, match="AR323"):
        bounded.crop(-1)
    assert not bounded.is_croppable
