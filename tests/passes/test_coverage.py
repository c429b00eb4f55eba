"""Rows of the coverage document are measured again: a spread of them in every change, all by `make test-all`."""

from __future__ import annotations

from pathlib import Path

import pytest
from census import Row, measure, read
from zoo.family import Family
from zoo.sources import FAMILIES, missing

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
SPREAD = (
    *(
        "transformers/bloom",
        "transformers/gpt_oss",
        "transformers/openai-gpt",
        "transformers/swin",
        "transformers/xlnet",
    ),
    *("torch/TransformerEncoderLayer, both", "torch/flex_attention", "written by hand/annotated transformer"),
)
ROWS = [
    pytest.param(family, id=family.key, marks=[] if family.key in SPREAD else pytest.mark.slow) for family in FAMILIES
]


@pytest.fixture(scope="module")
def written() -> dict[str, Row]:
    return read(DOCUMENT)


@pytest.mark.parametrize("family", ROWS)
def test_the_row_is_true(family: Family, written: dict[str, Row]) -> None:
    if missing(family):
        pytest.skip(f"not installed: {missing(family)}")
    assert measure(family) == written[family.key]


def test_every_family_has_a_row(written: dict[str, Row]) -> None:
    assert list(written) == [family.key for family in FAMILIES]


def test_nearly_all_attention_is_found_and_the_rest_has_a_reason(written: dict[str, Row]) -> None:
    rows = list(written.values())
    captured = [row for row in rows if not row.remark.startswith(("AR105", "AR107"))]
    transformers = [row for row in captured if row.source == "transformers"]
    for entry in ("inference", "training"):
        assert _share(transformers, entry) >= 0.975, entry
        assert _share(captured, entry) >= 0.96, entry
    assert len(rows) >= 300
    for row in rows:
        complete = row.inference == f"{row.layers}/{row.layers}"
        assert complete or row.remark, f"{row.family}: {row.inference} and no reason"


def _share(rows: list[Row], entry: str) -> float:
    counts = [getattr(row, entry).split("/") for row in rows if getattr(row, entry) != "none"]
    return sum(int(found) for found, _ in counts) / sum(int(layers) for _, layers in counts)
