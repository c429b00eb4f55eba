"""The tables of docs/variants.md are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import script

PAGE = Path(__file__).parents[1] / "docs" / "variants.md"


def test_what_each_variant_covers_is_up_to_date() -> None:
    made = script("variant_tables")
    rows = list(made.behaviour())
    assert len(rows) == 2 + len(made.cases())
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.slow
def test_what_each_variant_costs_is_up_to_date() -> None:
    assert "\n".join(script("variant_tables").costs()) in PAGE.read_text(encoding="utf-8"), "run `make docs`"
