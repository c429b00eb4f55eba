"""``attnrewrite kernels``: text and files of generated kernels."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest


def test_a_kernel_is_shown_with_its_digest(run: Any) -> None:
    code, out, _ = run("kernels", "show", "forward", "--variant", "ssa", "--head-dim", "128", "--format", "json")
    data = json.loads(out)
    assert code == 0
    assert "QueryTau" in data["text"]
    assert data["digest"] in data["text"]
    ast.parse(data["text"])


def test_flags_change_the_kernel(run: Any) -> None:
    texts = [
        run("kernels", "show", "forward", *more)[1] for more in ((), ("--set", "WINDOW=True"), ("--bidirectional",))
    ]
    assert len(set(texts)) == 3
    assert "window" in texts[1]


@pytest.mark.parametrize(("variant", "count"), [("sdpa", 6), ("selective", 10)])
def test_all_kernels_of_a_variant_are_emitted(run: Any, tmp_path: Path, variant: str, count: int) -> None:
    code, out, _ = run("kernels", "emit", tmp_path / "out", "--variant", variant, "--format", "json")
    files = list(json.loads(out)["files"].values())
    assert (code, len(files)) == (0, count)
    for file in files:
        ast.parse(Path(file).read_text())


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("show", "forwrd"), 1, "did you mean 'forward'"),
        (("show", "forward", "--variant", "routing"), 1, "AR403"),
        (("show", "forward", "--set", "WINDO=True"), 2, "no flag 'WINDO'"),
        (("show", "forward", "--set", "WINDOW"), 2, "FLAG=VALUE"),
        (("show", "forward", "--head-dim", "300"), 2, "256"),
        (("emit", "/dev/null/x"), 1, "AR602"),
    ],
)
def test_mistakes(run: Any, words: tuple[str, ...], code: int, text: str) -> None:
    found, out, err = run("kernels", *words)
    assert (found, out) == (code, "")
    assert text in err
