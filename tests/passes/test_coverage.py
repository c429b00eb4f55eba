"""Rows of the coverage document are measured again: a spread of them in every change, all by `make test-all`."""

from __future__ import annotations

from pathlib import Path

import pytest
from census import Row, measure, read
from zoo import FAMILIES, Family

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
SPREAD = ("bloom", "gpt_oss", "openai-gpt", "swin", "xlnet")
ROWS = [
    pytest.param(family, id=family.name, marks=[] if family.name in SPREAD else pytest.mark.slow) for family in FAMILIES
]


@pytest.fixture(scope="module")
def written() -> dict[str, Row]:
    return read(DOCUMENT)


@pytest.mark.parametrize("family", ROWS)
def test_the_row_is_true(family: Family, written: dict[str, Row]) -> None:
    assert measure(family) == written[family.name]


def test_every_family_has_a_row(written: dict[str, Row]) -> None:
    assert list(written) == [family.name for family in FAMILIES]


def test_nearly_all_attention_is_found_and_the_rest_has_a_reason(written: dict[str, Row]) -> None:
    rows = list(written.values())
    layers = sum(row.layers for row in rows)
    for entry in ("inference", "training"):
        found = [int(getattr(row, entry).split("/")[0]) for row in rows]
        assert sum(found) >= 0.975 * layers, entry
    assert len(rows) >= 120
    for row in rows:
        complete = row.inference == f"{row.layers}/{row.layers}"
        assert complete or row.remark, f"{row.family}: {row.inference} and no reason"
