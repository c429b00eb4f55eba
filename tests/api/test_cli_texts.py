"""Commands that show a converted model a text: what they set is saved, and nothing else is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import attnrewrite
from attnrewrite.conversion import new_state

ROUTING = ("--variant", "routing", "--set", "clusters=4", "--set", "window_size=8")
TEXT = "The one who waits looks at the time, and the one who attends looks at the lamp. " * 4


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_from_a_conversion_to_a_calibrated_model(folder: str, run: Any, run_json: Any, text: Path) -> None:
    start, out = text.parent / "routing", text.parent / "calibrated"
    code, said, _ = run("convert", folder, start, *ROUTING)
    assert code == 0
    assert "2 sites converted, outputs not compared" in said
    assert "→ routing  clusters=4, window_size=8\n" in said
    assert f"next: attnrewrite calibrate {start}" in said
    code, data = run_json("eval", start, "--text", text, "--seq-len", 32)
    assert (code, data["error"]["code"]) == (1, "AR315")
    assert "attnrewrite calibrate" in data["error"]["hint"]

    words = ("calibrate", start, out, "--text", text, "--strips", 3, "--seq-len", 32)
    code, data = run_json(*words)
    assert (code, data["strips"], len(data["rows"])) == (0, 3, 2 * 4)
    layers = [row["layer"] for row in data["distance"]["layers"]]
    assert layers == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert data["distance"]["kl"] > 0
    code, measured = run_json("eval", out, "--text", text, "--seq-len", 32)
    assert (code, measured["model"]["perplexity"] > 1) == (0, True)

    before, after = attnrewrite.load_pretrained(start), attnrewrite.load_pretrained(out)
    added = {name for name, _ in new_state(after)}
    now = after.state_dict()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, now[name])}
    assert moved == added
    code, said, _ = run(*words, "--overwrite")
    assert code == 0
    assert "2 layers calibrated on 3 strips" in said
    assert "divergence of the next tokens" in said


def test_what_cannot_be_calibrated_is_named(folder: str, run: Any, run_json: Any, tmp_path: Path) -> None:
    code, data = run_json("calibrate", folder, tmp_path / "out", "--seq-len", 32)
    assert (code, data["error"]["code"]) == (1, "AR310")
    assert run("convert", folder, tmp_path / "ssa", "--variant", "ssa")[0] == 0
    code, data = run_json("calibrate", tmp_path / "ssa", tmp_path / "out", "--seq-len", 32)
    assert (code, data["error"]["code"]) == (1, "AR316")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "where"), [("calibrate", "calibration.calibrate"), ("distill", "distillation.distill")]
)
def test_an_interruption_leaves_nothing_behind(
    folder: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, where: str
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    assert run("convert", folder, tmp_path / "start", *ROUTING)[0] == 0
    monkeypatch.setattr(f"attnrewrite.{where}", interrupt)
    code, _, err = run(verb, tmp_path / "start", tmp_path / "out", "--seq-len", 32)
    assert code == 130
    assert f"{tmp_path / 'out'} was not written" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize("verb", ["convert", "export", "calibrate", "distill"])
def test_out_that_cannot_be_written_is_refused_before_the_work(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("attnrewrite.loading.load_model", fail)
    variant = ("--variant", "ssa") if verb == "convert" else ()
    (tmp_path / "file").touch()
    code, _, err = run(verb, "model", tmp_path / "file" / "deep" / "out", *variant)
    assert code == 1
    assert f"{tmp_path / 'file'}: Not a directory" in err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root, every folder can be written
    code, _, err = run(verb, "model", tmp_path / "deep" / "out", *variant)
    assert code == 1
    assert f"{tmp_path}: Permission denied" in err


def test_convert_says_how_far_an_approximation_is(folder: str, run: Any, run_json: Any, tmp_path: Path) -> None:
    raw = ("--variant", "selective", "--set", "mode=raw", "--dry-run")
    code, data = run_json("convert", folder, tmp_path / "out", *raw)
    assert code == 0
    assert all(len(row["maps"]) == len(row["outputs"]) == 4 for row in data["distance"]["layers"])
    said = run("convert", folder, tmp_path / "out", *raw)[1]
    for part in ("relative error of the attention weights: ", "attention results: ", "divergence of the next tokens: "):
        assert part in said


def test_warnings_are_for_people(folder: str, run: Any, tmp_path: Path) -> None:
    """The layer that is left as it is is named, and no line of code is."""
    words = ("--variant", "symmetric", "--set", "max_error=0.865", "--dry-run")
    code, said, err = run("convert", folder, tmp_path / "out", *words)
    assert code == 0
    assert "1 site would be converted, measured" in said
    assert err.startswith("warning: AR321 ")
    assert "sharing.py" not in err
