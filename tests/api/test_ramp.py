"""Selective attention that is ramped up: the factor of the votes moves from 0 to 1 by itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from rows import rows

import attnrewrite
from attnrewrite import AttnRewriteError, SelectiveConfig, SelectiveSSAConfig, VariantConfig

IDS = torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(0))


CONFIGS = [SelectiveConfig("ramp", ramp_steps=4), SelectiveSSAConfig(mode="ramp", ramp_steps=4)]


@pytest.mark.parametrize("config", rows(CONFIGS, quick=CONFIGS[:1]))
def test_a_ramp_starts_as_the_model_and_ends_as_the_paper(config: VariantConfig, tmp_path: Path) -> None:
    """Step by step, and not beyond 1; the step is saved, and nothing of it is trained."""
    plain = tiny.llama().double()
    model = attnrewrite.convert(copy.deepcopy(plain), config, example_inputs=(IDS,))
    raw = attnrewrite.convert(copy.deepcopy(plain), SelectiveConfig("raw"), example_inputs=(IDS,))
    place = model.model.layers[1].self_attn.get_submodule(config.variant)
    start, goal = (m(IDS, use_cache=False).logits for m in (plain, raw))
    assert torch.allclose(model(IDS, use_cache=False).logits, start, atol=1e-12)
    assert "gamma" not in dict(place.named_parameters())
    seen = []
    for step in range(6):
        attnrewrite.update(model)
        seen.append(float(place.gamma))
        if step == 1:
            attnrewrite.save_pretrained(model, tmp_path / "half")
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert torch.allclose(model(IDS, use_cache=False).logits, goal, atol=1e-12)
    again = attnrewrite.load_pretrained(tiny.llama().double(), tmp_path / "half")
    kept = again.model.layers[1].self_attn.get_submodule(config.variant)
    assert (float(kept.gamma), int(kept.steps)) == (0.5, 2)
    attnrewrite.update(again)
    assert float(kept.gamma) == 0.75


def test_a_ramp_has_a_length() -> None:
    with pytest.raises(AttnRewriteError, match="AR303"):
        SelectiveConfig("ramp", ramp_steps=0)
