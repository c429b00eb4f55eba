"""``attnrewrite bench``: what it writes, what it keeps when interrupted, and what it says to bad input."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest
import torch

from attnrewrite.bench import run as runs
from attnrewrite.bench.attentions import Attention
from attnrewrite.bench.case import FORWARD, PASSES
from attnrewrite.bench.peers import PEERS
from attnrewrite.bench.sweep import AXES, points
from attnrewrite.bench.variants import names
from attnrewrite.cli import bench as cli_bench
from attnrewrite.cli import main

CPU = torch.device("cpu")
TINY = ("--batch", 1, "--heads", 2, "--head-dim", 8, "--threads", 1)


@pytest.fixture
def quick(monkeypatch):
    """Take a few rounds, and a small default."""
    monkeypatch.setattr(runs, "ROUNDS", 3)
    monkeypatch.setitem(cli_bench.DEFAULTS, "cpu", {"batch": 1, "heads": 2, "seq_len": 32, "head_dim": 8})


def test_the_passes_are_those_that_can_be_measured():
    assert cli_bench.PASSES == PASSES


def test_all_variants_at_one_point(run_json, quick):
    code, data = run_json("bench", "--device", "cpu", "--threads", 1)
    assert code == 0
    assert [row["name"] for row in data["rows"]] == ["sdpa", "sdpa (variant)", *names()[1:]]
    assert all(row["ms"] > 0 and row["p20"] <= row["ms"] <= row["p80"] and row["ratio"] > 0 for row in data["rows"])
    assert all(row["error"] < 1e-5 for row in data["rows"])
    assert data["rows"][0]["ratio"] == 1
    assert data["settings"]["baseline"] == "sdpa"
    assert not data["interrupted"]


def test_table_and_files(run, quick, tmp_path):
    files = {form: tmp_path / "new" / f"out.{form}" for form in ("csv", "json", "svg")}
    words = [word for form, file in files.items() for word in (f"--{form}", file)]
    sweeps = ("--sweep", "seq_len=16:32:x2", "--sweep", "head_dim=4,8")
    passes = [word for name in PASSES for word in ("--pass", name)]
    asked = ("--variant", "ssa", "--baseline", "eager", "--baseline", "sdpa-cudnn", *sweeps, *passes)
    code, out, err = run("bench", "--device", "cpu", "--threads", 1, "--batch", 1, *asked, *words)
    assert code == 0
    assert all(f"wrote {file}" in err for file in files.values())
    assert "needs a CUDA GPU" in out
    assert "÷ eager" in out
    data = json.loads(files["json"].read_text())
    assert len(data["rows"]) == 4 * 4 * 3
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(data["rows"])
    for line, row in zip(lines, data["rows"], strict=True):
        assert (line["pass"], line["name"], int(line["seq_len"])) == (row["pass"], row["name"], row["seq_len"])
        assert line["ms"] == ("" if row["ms"] is None else str(row["ms"]))
    tree = ET.parse(files["svg"])
    assert sum(x.tag.endswith("polyline") for x in tree.iter()) == 2 * 4 * 2  # two that run, passes, features
    assert sorted(x.name for x in tmp_path.glob("new/*")) == ["out.csv", "out.json", "out.svg"]


def test_files_that_exist_are_kept(run, quick, tmp_path):
    file = tmp_path / "out.csv"
    file.write_text("mine")
    code, _, err = run("bench", "--csv", file)
    assert code == 1
    assert "AR601" in err
    assert file.read_text() == "mine"
    code, _, _ = run("bench", "--device", "cpu", "--variant", "ssa", "--csv", file, "--overwrite", "--threads", 1)
    assert code == 0
    assert file.read_text() != "mine"


def test_an_interruption_keeps_what_was_measured(run, quick, monkeypatch, tmp_path):
    def make(setting):
        def call(q, k, v):
            if setting.case.N == 32:
                raise KeyboardInterrupt
            return q * 1

        return call

    monkeypatch.setitem(PEERS, "eager", Attention(make, None))
    file = tmp_path / "out.json"
    words = ("--variant", "ssa", "--baseline", "sdpa", "--baseline", "eager", "--sweep", "seq_len=16,32,64")
    code, out, err = run("bench", "--device", "cpu", "--threads", 1, *words, "--json", file)
    assert code == 130
    assert "interrupted" in err
    data = json.loads(file.read_text())
    assert data["interrupted"]
    measured = [(row["seq_len"], row["name"]) for row in data["rows"] if row["ms"] is not None]
    assert measured == [(16, "sdpa"), (16, "eager"), (16, "ssa")]
    assert {row["why"] for row in data["rows"] if row["seq_len"] == 32} == {"interrupted"}
    assert "16" in out


def test_an_interruption_in_the_middle_of_a_pass_keeps_its_rounds(monkeypatch):
    calls = iter(range(100))

    def make(setting):
        def call(q, k, v):
            if next(calls) == 6:
                raise KeyboardInterrupt
            return q * 1

        return call

    bench = runs.Bench(
        points(dict.fromkeys(AXES, 4), []), {"x": Attention(make, None)}, "x", [FORWARD], CPU, torch.float32, True, 60
    )
    with pytest.raises(KeyboardInterrupt):
        bench.run(lambda *_: None)
    (row,) = bench.rows
    assert row.rounds == 3  # after one that shows that it works, one for memory and one to warm up
    assert row.ratio == 1


def test_a_size_that_does_not_fit_is_a_line_and_the_next_goes_on(run_json, quick):
    code, data = run_json("bench", "--device", "cpu", "--variant", "sea", "--sweep", "batch=64m,1", *TINY[2:])
    assert code == 0
    large, small = ([row for row in data["rows"] if row["batch"] == batch] for batch in (64 << 20, 1))
    assert any("does not fit into memory" in row["why"] or "no time" in row["why"] for row in large)
    assert all(row["ms"] is None for row in large)
    assert all(row["ms"] is not None for row in small)


def test_what_there_is_no_time_for_is_said(run_json, quick):
    code, data = run_json("bench", "--device", "cpu", "--variant", "ssa", "--seconds", "1e-9")
    assert code == 1
    assert {row["why"] for row in data["rows"]} == {"left out: no time"}


def test_the_next_point_is_foreseen(monkeypatch):
    bench = runs.Bench(
        [{"batch": 1, "heads": 2, "kv_heads": 2, "seq_len": n, "head_dim": 4} for n in (16, 1 << 14)],
        {"slow": Attention(lambda s: lambda q, k, v: (__import__("time").sleep(0.01), q * 1)[1], None)},
        "slow",
        [FORWARD],
        CPU,
        torch.float32,
        True,
        60,
    )
    bench.run(lambda *_: None)
    first, second = bench.rows
    assert first.ms >= 10
    assert second.ms is None
    assert "a call takes about" in second.why


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--sweep", "seq_len=1k:2k"), 2, "not of the form"),
        (("--sweep", "sec_len=1"), 2, "did you mean 'seq_len'"),
        (("--sweep", "heads=3", "--kv-heads", 2), 2, "3 heads cannot share 2 kv_heads"),
        (("--sweep", "heads=3", "--heads", 2), 2, "heads is given and swept"),
        (("--seq-len", 0), 2, "no size"),
        (("--batch", "x4"), 2, "no size"),
        (("--seconds", 0), 2, "x>0"),
        (("--svg", "x.svg"), 2, "no --sweep"),
        (("--csv", "x", "--json", "x"), 2, "one file"),
        (("--variant", "selectiv"), 1, "did you mean 'selective'"),
        (("--variant", "ssa:gat=full"), 1, "did you mean 'gate'"),
        (("--variant", "routing:clusters=none"), 1, "AR303"),
        (("--variant", "routing:clusters"), 1, "KEY=VALUE"),
        (("--variant", "ssa:gate=full"), 1, "about the layer"),
        (("--variant", "selective:mode=new-head"), 1, "adds a head"),
        (("--baseline", "sdpa-flsh"), 1, "did you mean 'sdpa-flash'"),
        (("--pass", "sideways"), 2, "forward+backward"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input_is_said(run, words, code, said):
    found, out, err = run("bench", *words)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(run):
    code, out, err = run("bench", "--device", "cuda")
    assert (code, out) == (2, "")
    assert "no GPU" in err
    assert "nothing was measured" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flex", "eager-inductor", "selective-flex", "selective-inductor"])
def test_compiled_baselines(run_json, quick, name):
    code, data = run_json("bench", "--device", "cpu", "--variant", "sdpa", "--baseline", name, "--threads", 1)
    assert code == 0
    assert data["rows"][0]["error"] < 5e-3, data["rows"][0]["why"]


def test_a_form_is_printed_as_it_is(capsys):
    """Rich would make a picture of a letter between colons."""
    assert main(["bench", "--sweep", "seq_len=64:32"]) == 2
    assert "A:B:xF" in capsys.readouterr().err
