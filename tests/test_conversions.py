"""The table of conversions, on a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from attnrewrite import SelectiveConfig, SSAConfig

FILE = Path(__file__).parents[1] / "benchmarks" / "conversions.py"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FILE.parent))
    spec = importlib.util.spec_from_file_location("conversions", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "conversions", module)
    spec.loader.exec_module(module)
    return module


def test_rows_say_what_a_conversion_did_or_why_it_was_refused(conversions: Any) -> None:
    """An identity is at distance 0 with its parameters counted; a raw one is not; a wrong head is refused."""
    model, ids = tiny.llama(), torch.randint(96, (1, 16), generator=torch.Generator().manual_seed(0))
    score = lambda m: float(m(ids, use_cache=False).logits.std())  # noqa: E731  # a name for one use
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
