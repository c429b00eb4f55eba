"""The memory loss: what it is at its bounds, that it is the reference's, and that training by it frees memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import llama
from torch import Tensor

import attnrewrite
from attnrewrite import AttnRewriteError, MemoryLoss, SelectiveConfig, SelectiveSSAConfig, SSAConfig
from attnrewrite.conversion import new_parameters
from attnrewrite.functional import selective_memory
from attnrewrite.observation import Observed, outputs_observed

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))
INPUTS = {"input_ids": IDS, "use_cache": False}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def converted(config: Any) -> Any:
    torch.manual_seed(1)
    model = llama()
    for weight in model.parameters():
        weight.data.mul_(4.0 if weight.dim() > 1 else 1.0)
    return attnrewrite.convert(model, config, example_kwargs=INPUTS)


def test_it_is_1_where_nobody_votes_and_the_model_is_what_it_is() -> None:
    model = converted(SelectiveConfig())
    output, memory = MemoryLoss(model)(**INPUTS)
    assert memory.item() == 1.0
    assert torch.allclose(output.logits, model(**INPUTS).logits, atol=1e-5)


@pytest.mark.parametrize("config", [SelectiveConfig(), SelectiveSSAConfig(), SelectiveConfig("selector")])
def test_it_is_the_mean_of_the_shares_of_layers_and_sequences(config: Any) -> None:
    """By the tensors that an observer of the model sees."""
    model = converted(config)
    with torch.no_grad():
        for name, weight in new_parameters(model):
            weight.normal_() if weight.dim() else weight.fill_(0.6 if name.endswith("gamma") else 0.0)
        if isinstance(config, SelectiveSSAConfig):  # temperatures that are all 1
            for name, weight in new_parameters(model):
                weight.zero_() if name.endswith("gate") else None
    shares: list[Tensor] = []

    def see(at: Observed) -> None:
        t = at.tensors
        own: dict[str, Any] = {"gamma": t.extra.get("gamma", 1.0)}
        if "q_proj" in t.extra:
            own |= {f"vote_{of}": t.extra["input"] @ t.extra[f"{of[0]}_proj"].mT for of in ("query", "key")}
        real = MASK.bool()
        needed = selective_memory(t.query(), t.key(), real[:, None, None], enable_gqa=True, tau=0.5, **own)
        shares.append(needed.max(-1).values / real.sum(-1))

    inputs = {**INPUTS, "attention_mask": MASK}
    list(outputs_observed(model, [inputs], see, converted=True))
    with torch.no_grad():
        _, memory = MemoryLoss(model, tau=0.5)(**inputs)
    assert torch.allclose(memory, torch.stack(shares).mean(), atol=1e-6)
    assert 0.05 < float(memory) < 0.999


@pytest.mark.parametrize("mode", ["gate", "selector", "new-head"])
def test_training_by_it_frees_memory(mode: Any) -> None:
    """Beside the model's own loss, of new parameters alone and in training mode."""
    model = converted(SelectiveConfig(mode)).train()
    weights = [weight for _, weight in new_parameters(model)]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    run, course = MemoryLoss(model), []
    for _ in range(25):
        output, memory = run(input_ids=IDS, labels=IDS)
        course.append(float(memory.detach()))
        optimizer.zero_grad()
        (output.loss + 0.5 * memory).backward()
        optimizer.step()
    assert course[0] > 0.99
    assert course[-1] < 0.8
    if mode != "gate":
        assert all(weight.grad is not None and weight.grad.any() for weight in weights)


def test_what_it_needs_is_named() -> None:
    model = llama()
    with pytest.raises(AttnRewriteError, match="AR310"):
        MemoryLoss(model)
    attnrewrite.convert(model, SSAConfig(), example_kwargs=INPUTS)
    with pytest.raises(AttnRewriteError, match="AR324"):
        MemoryLoss(model)
