"""Rows of parametrised tests: which of them `make test` runs, and which only `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def rows(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return ``values``; those that are not ``quick`` are marked slow. A tuple is a row of several arguments."""

    def row(value: Any) -> Any:
        arguments = value if isinstance(value, tuple) else (value,)
        return pytest.param(*arguments, marks=() if value in quick else pytest.mark.slow)

    return [row(value) for value in values]
