"""Distance: how far a converted model is from its teacher."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from attnrewrite import SelectiveConfig, SSAConfig, convert
from attnrewrite.distances import distance

IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [SelectiveConfig(), SSAConfig()], ids=lambda c: c.variant)
def test_a_conversion_that_starts_as_identity_is_at_distance_zero(config: SelectiveConfig | SSAConfig) -> None:
    """Up to rounding, in every layer and head and at the output; later it is not."""
    teacher = tiny.llama().double()
    model = convert(copy.deepcopy(teacher), config, example_inputs=(IDS,))
    found = distance(model, teacher, [IDS])
    assert [row.layer for row in found.layers] == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert all(len(row.maps) == len(row.outputs) == 4 for row in found.layers)
    assert max(x for row in found.layers for x in (*row.maps, *row.outputs)) < 1e-6
    assert found.kl is not None
    assert abs(found.kl) < 1e-12

    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "q_gain")):
            torch.nn.init.constant_(parameter, 20.0)
    moved = distance(model, teacher, [IDS])
    assert moved.kl is not None
    assert moved.kl > 1e-12
    assert all(min(max(row.maps), max(row.outputs)) > 1e-5 for row in moved.layers)


def test_distance_is_that_of_the_definition() -> None:
    """Doubled values in one layer: its maps do not move, its outputs are one norm away; the layer behind sees it."""
    teacher = tiny.llama().double()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(2.0)
    found = distance(model, teacher, [IDS, IDS[:, :5]])
    first, second = found.layers
    assert max(*first.maps, *first.outputs, *second.maps) == 0.0
    assert second.outputs == pytest.approx([1.0] * 4, abs=1e-12)
