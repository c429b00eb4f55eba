"""The tables of docs/variants.md are what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made() -> Any:
    spec = importlib.util.spec_from_file_location("variant_tables", ROOT / "benchmarks" / "variant_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_each_variant_covers_is_up_to_date(made: Any) -> None:
    rows = list(made.behaviour())
    assert len(rows) == 2 + len(made.cases())
    assert "\n".join(rows) in (ROOT / "docs" / "variants.md").read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.slow
def test_what_each_variant_costs_is_up_to_date(made: Any) -> None:
    assert "\n".join(made.costs()) in (ROOT / "docs" / "variants.md").read_text(encoding="utf-8"), "run `make docs`"
