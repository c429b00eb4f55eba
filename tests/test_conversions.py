"""The table of conversions, on a tiny model."""

from __future__ import annotations

import pytest
import tiny
import torch
from scripts import FOLDER, script

from attnrewrite import SelectiveConfig, SSAConfig


def test_rows_say_what_a_conversion_did_or_why_it_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity is at distance 0 with its parameters counted; a raw one is not; a wrong head is refused."""
    monkeypatch.syspath_prepend(str(FOLDER))
    conversions = script("conversions")
    model, ids = tiny.llama(), torch.randint(96, (1, 16), generator=torch.Generator().manual_seed(0))
    score = lambda m: float(m(ids, use_cache=False).logits.detach().std())  # noqa: E731  # a name for one use
    subject = conversions.Subject("tiny", model, [ids], [ids], "spread", score)
    recipes = [
        conversions.Recipe("ssa", SSAConfig()),
        conversions.Recipe("raw", SelectiveConfig("raw")),
        conversions.Recipe("wrong", SelectiveConfig(selection_head=7)),
    ]
    rows = [conversions.convert_and_compare(subject, recipe) for recipe in recipes]
    ssa, raw, wrong = rows
    assert ssa.parameters == 2 * (4 * 8 + 2 * 8 + 2)
    assert max(x for heads in ssa.outputs.values() for x in heads) < 1e-5
    assert raw.parameters == 0
    assert max(x for heads in raw.maps.values() for x in heads) > 0
    assert wrong.refused.startswith("AR307")
    text = conversions.page([(subject, 1.0, rows)])
    assert "| ssa | +100 |" in text
    assert "| wrong | refused: AR307" in text
    assert "`model.layers.1.self_attn`" in text
