"""SSA's ablations, and its temperatures under the votes of selective attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch

from attnrewrite import SelectiveConfig, SelectiveSSAConfig, SSAConfig, VariantConfig, convert
from attnrewrite.conversion import new_parameters

IDS = torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(0))


def converted(config: VariantConfig, **values: float) -> Any:
    """Convert a Llama in float64; every new parameter is random by its name, or the constant given."""
    model = tiny.llama().double()
    convert(model, config, example_inputs=(IDS,))
    with torch.no_grad():
        for path, parameter in new_parameters(model):
            name = path.rpartition(".")[2]
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(torch.full_like(drawn, values[name]) if name in values else drawn)
    return model


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits.detach()
    return found


@pytest.mark.parametrize("gate", ["head", "full", "shared"])
@pytest.mark.parametrize(("parts", "on"), [("both", "both"), ("token", "query"), ("position", "value")])
def test_every_form_of_ssa_starts_as_the_same_function_and_then_is_not(gate: Any, parts: Any, on: Any) -> None:
    config = SSAConfig(gate=gate, parts=parts, on=on)
    plain = tiny.llama().double()
    model = convert(copy.deepcopy(plain), config, example_inputs=(IDS,))
    assert torch.allclose(logits(model), logits(plain), atol=1e-12)
    heads = {"head": 1, "full": 4, "shared": 1}[gate], {"head": 1, "full": 2, "shared": 1}[gate]
    counts = {"q_gate": 32 * heads[0], "v_gate": 16 * heads[1], "q_gain": 1, "v_gain": 1}
    kept = {n for n in counts if on in ("both", {"q": "query", "v": "value"}[n[0]])}
    kept = {n for n in kept if parts == "both" or n.endswith({"token": "gate", "position": "gain"}[parts])}
    assert sum(p.numel() for _, p in new_parameters(model)) == 2 * sum(counts[n] for n in kept)
    model(IDS, use_cache=False).logits.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for _, p in new_parameters(model) if p.grad is not None)
    assert all(p.grad is not None for _, p in new_parameters(model))


def test_a_composition_is_each_of_its_parts_where_the_other_is_neutral() -> None:
    """With gamma 0 it is SSA, with neutral temperatures selective attention, with neither the model itself."""
    both = logits(converted(SelectiveSSAConfig(), gamma=0.0))
    assert torch.allclose(both, logits(converted(SSAConfig())), atol=1e-12)
    neutral = {"q_gate": 0.0, "v_gate": 0.0, "q_gain": 0.0, "v_gain": 0.0}
    votes = logits(converted(SelectiveSSAConfig(), gamma=30.0, **neutral))
    assert torch.allclose(votes, logits(converted(SelectiveConfig(), gamma=30.0)), atol=1e-12)
    plain = tiny.llama().double()
    start = convert(copy.deepcopy(plain), SelectiveSSAConfig(), example_inputs=(IDS,))
    assert torch.allclose(logits(start), logits(plain), atol=1e-12)
    whole = logits(converted(SelectiveSSAConfig(), gamma=30.0))
    assert float((whole - both).abs().max()) > 1e-6
    assert float((whole - votes).abs().max()) > 1e-6


def test_a_composition_decodes_with_a_cache_as_over_the_whole_sequence() -> None:
    model = converted(SelectiveSSAConfig(), gamma=30.0)
    whole = logits(model)
    with torch.no_grad():
        first = model(IDS[:, :6])
        steps, cache = [first.logits], first.past_key_values
        for n in range(6, IDS.shape[1]):
            out = model(IDS[:, n : n + 1], past_key_values=cache)
            steps.append(out.logits)
            cache = out.past_key_values
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-9)
