"""Every benchmark runs at a tiny size, and what it writes has everything that a reader needs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnrewrite.bench.clock import interleave

FOLDER = Path(__file__).parents[1] / "benchmarks"
RESULT = {"schema", "entry", "question", "profile", "size", "environment", "figures", "facts", "notes"}
FIGURE = {"case", "provider", "metric", "unit", "p20", "p50", "p80", "samples"}
FIGURE |= {"floor", "over_floor", "goal", "met"}
ENVIRONMENT = {"date", "versions", "system", "cpu", "cores", "threads"}
COMPILES = ("kernels", "llama_eager", "attention_eager", "compile_share", "matchers", "memory", "variants")
QUICK = ("import_time", "recognise", "tuning_search", "tuning_store")
NAMES = (*COMPILES, *QUICK)


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", str(FOLDER / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def load(name):
    """Import one file of the suite without putting its folder on the path."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / "suite" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(result, profile):
    assert set(result) == RESULT
    assert set(result["environment"]) >= ENVIRONMENT
    assert result["profile"] == profile
    assert result["figures"]
    assert result["notes"]
    for figure in result["figures"]:
        assert set(figure) == FIGURE
        assert figure["samples"]
        assert figure["p20"] <= figure["p50"] <= figure["p80"]
        assert (figure["goal"] is None) == (figure["met"] is None)


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in COMPILES), *QUICK])
def test_entry_runs(name, tmp_path):
    done = run("--profile", "smoke", "--only", name, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "smoke" / f"{name}.json").read_text())
    assert result["entry"] == name
    check(result, "smoke")
    page = (tmp_path / "smoke.md").read_text()
    assert f"## {name}" in page
    assert page.partition("\n### ")[0].count("\n| ") == len(result["figures"]) + 2  # tables of facts come after


def test_every_entry_is_tested():
    done = run("--list")
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(NAMES)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("results/*/*.json")), ids=lambda path: path.stem)
def test_committed_result_is_complete(path):
    text = path.read_text(encoding="utf-8")
    check(json.loads(text), path.parent.name)
    assert not re.search(r"[\"\s]/\w+/", text), "a path of the machine"
    assert f"## {path.stem}" in (FOLDER / "results" / f"{path.parent.name}.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_profile_needs_a_gpu(tmp_path):
    done = run("--profile", "gpu", "--out", str(tmp_path))
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_unknown_entry_names_the_closest():
    done = run("--only", "recognize")
    assert done.returncode == 2
    assert "did you mean 'recognise'" in done.stderr


def test_ratio_is_taken_round_by_round():
    figures = load("figures")
    found = figures.ratio("", "", ("peer", [2.0, 8.0]), ("ours", [1.0, 2.0]), figures.Goal(">=", 3.0))
    assert list(found.samples) == [2.0, 4.0]
    assert found.median == 3.0
    assert found.met
    assert not figures.Goal("<=", 2.9).met(found.median)


def test_rounds_are_interleaved():
    order = []
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = interleave(cases, 2, lambda *_: None, "", warmup=1)
    assert order == list("abc") + list("bca") + list("cab")
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2, "c": 2}
