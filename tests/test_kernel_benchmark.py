"""The kernels' benchmark without a GPU: who fails is a line, what there is no time for is named, goals are ratios."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import script

from attnrewrite.bench import contest as contests
from attnrewrite.bench.attentions import Attention
from attnrewrite.bench.case import Setting
from attnrewrite.kernels.dense.configs import configs
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.device import H200
from attnrewrite.kernels.tuning.published import RATES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from suite import goals, peers  # noqa: E402  # found through the path above
from suite.beforehand import _summary  # noqa: E402
from suite.entries import kernels as entry  # noqa: E402
from suite.model import Model  # noqa: E402
from suite.roofline import Dot, roofline  # noqa: E402
from suite.together import Done, together  # noqa: E402

TINY = goals.P1._replace(B=1, H=2, N=20, D=16)


class Clock:
    """Says that everything takes so long, and that the second provider is twice as slow."""

    def __init__(self):
        self.runs = []

    def __call__(self, run):
        run()
        self.runs.append(run)
        return 0.001 * (1 + len(self.runs) % 2)


@pytest.fixture
def setting():
    return Setting(TINY, torch.device("cpu"), torch.float32, compiled=False)


def hold(setting, enough=lambda: False, clock=None, **makers):
    contest = contests.Contest(setting.case)
    attentions = {name: Attention(make, None) for name, make in makers.items()}
    contests.hold(contest, setting, attentions, clock or Clock(), 4, lambda *_: None, enough)
    return contest


def works(s):
    return lambda q, k, v: q * k * v


def test_who_fails_is_a_line_with_its_reason(setting):
    def cannot_be_made(s):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB")

    def cannot_run(s):
        def call(q, k, v):
            raise RuntimeError("No available kernel.")

        return call

    def has_no_backward(s):
        return lambda q, k, v: (q * 2).detach()

    def fails_later(s):
        calls = iter(range(100))

        def call(q, k, v):
            if next(calls) == 3:
                raise RuntimeError("launch failed")
            return q * k * v

        return call

    found = hold(setting, a=works, b=cannot_be_made, c=cannot_run, d=has_no_backward, e=fails_later)
    assert found.seconds.keys() == {("forward", "a"), ("backward", "a"), ("forward", "d")}
    assert found.failures["forward", "b"] == "OutOfMemoryError: CUDA out of memory."
    assert found.failures["forward", "c"] == "RuntimeError: No available kernel."
    assert "does not require grad" in found.failures["backward", "d"]
    assert found.failures["forward", "e"] == "RuntimeError: launch failed"
    assert found.failure("backward", "b") == found.failures["forward", "b"]
    lines = {(x["pass"], x["provider"]): x for x in entry._records(found)}
    assert lines["forward", "c"] == {
        "inputs": "P1",
        "pass": "forward",
        "provider": "c",
        "failure": "RuntimeError: No available kernel.",
    }
    assert lines["forward", "a"]["p20"] <= lines["forward", "a"]["ms"] <= lines["forward", "a"]["p80"]


def test_a_device_that_breaks_down_leaves_what_was_measured(setting):
    class Broken(Clock):
        def __call__(self, run):
            if len(self.runs) > 7:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().__call__(run)

    found = hold(setting, clock=Broken(), a=works)
    assert ("forward", "a") in found.seconds
    assert "illegal memory access" in found.failures["backward", "a"]


def test_what_there_is_no_time_for_is_named(setting):
    asked = iter([False, True] + [True] * 9)
    found = hold(setting, lambda: next(asked), a=works, b=works)
    assert not found.seconds
    assert set(found.failures.values()) == {"left out: no time"}


def test_errors_are_those_against_float64(setting):
    flash = peers.providers(TINY)[goals.FLASH]
    off = Attention(lambda s: lambda *x: flash.make(s)(*x) * 1.01, flash.formula)
    contest = contests.Contest(TINY)
    contests.hold(contest, setting, {"flash": flash, "off": off}, Clock(), 1, lambda *_: None, lambda: False)
    for metric in ("forward", "backward"):
        assert 0 < contest.errors[metric, "flash"] < 1e-6
        assert contest.errors[metric, "off"] == pytest.approx(0.01, rel=1e-3)


def test_votes_as_flex_has_them_are_those_of_the_reference(setting):
    flex, twin = peers.providers(TINY)[goals.FLEX_F], setting.exact(None)
    votes, true = flex.make(setting)(*setting.tensors), flex.formula(twin)(*twin.tensors)
    assert torch.allclose(votes.double(), true, atol=5e-3)  # F in 16 bit


def test_goals_divide_by_the_faster_form_of_flex():
    contest = contests.Contest(goals.P1)
    contest.seconds = {("forward", goals.PLAIN): [1.0, 1.0, 3.0]}
    contest.failures = {("forward", goals.FLEX): "RuntimeError: no", ("forward", goals.FLEX_TMA): "RuntimeError: never"}
    aim = goals.GOALS[0]
    line = entry._goal(aim, contest, None, "")
    assert (line["measured"], line["must"], line["target"]) == ("not measured", 1.0, 0.85)
    assert line["why"] == "flex: RuntimeError: no; flex, TMA: RuntimeError: never"
    contest.seconds |= {("forward", goals.FLEX): [4.0] * 3, ("forward", goals.FLEX_TMA): [2.0] * 3}
    assert entry._goal(aim, contest, None, "")["measured"] == 0.5
    (figure,) = entry._ratios({"P1": contest}, None)
    assert (figure.provider, figure.met) == ("plain / flex, TMA", True)
    assert entry._goal(goals.GOALS[-1], None, 0.5e9, "")["measured"] == 0.5


def test_every_goal_is_about_somebody_who_is_measured():
    for aim in goals.GOALS:
        names = peers.providers(aim.case)
        assert {aim.over, *aim.under} <= names.keys()
        assert aim.target <= aim.must
        assert aim.case == goals.MEMORY or aim.metric in peers.passes(aim.case)
        if aim.metric == "backward":
            assert not any(names[name].forward_only for name in (aim.over, *aim.under))


def test_the_drawing_has_a_dot_for_everybody():
    dots = [Dot("P1 forward: plain", 2000, 400.0), Dot('<"others">', 5.0, 3.0)]
    tree = ET.fromstring(roofline("a title", H200, (64, 128), dots))
    circles = [x for x in tree.iter() if x.tag.endswith("circle")]
    assert len(circles) == 4
    text = " ".join(x.text or "" for x in tree.iter())
    assert '<"others">' in text
    assert "no overlap, d = 64" in text


def test_commands_run_together_and_are_stopped():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    done = together({"quick": ("-c", "print(7); raise SystemExit(3)"), "hangs": ("-c", code)}, 3)
    assert (done["quick"].code, done["quick"].output, done["quick"].stopped) == (3, "7\n", False)
    assert done["hangs"].stopped
    assert done["hangs"].seconds < 20


def test_the_committed_predictions_are_those_in_the_page():
    stored = json.loads((ROOT / "benchmarks" / "results" / "predictions.json").read_text())
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    predict = script("predict")
    assert stored["device"] == H200.name
    assert len(stored["goals"]) == len(goals.GOALS)
    for aim, row in zip(goals.GOALS, stored["goals"], strict=True):
        assert (row["case"], row["metric"], row["what"]) == (aim.case.name, aim.metric, aim.text)
        assert (row["must"], row["target"]) == (aim.must, aim.target)
        assert predict.line(row) in page, "run `make predictions`"


def test_the_model_answers_for_every_goal():
    used = Resources(120, 0, 65_536, "HGMMA")
    model = Model(H200, RATES[H200.name], lambda *_: used)
    for aim in goals.GOALS:
        expected, floor = model.ratio(aim), model.floor(aim)
        assert 0 <= floor <= expected * 1.001, aim.text
    spilling = Model(H200, RATES[H200.name], lambda *_: replace(used, spills=1000))
    assert spilling.seconds(goals.PLAIN, goals.P1, "forward") > model.seconds(goals.PLAIN, goals.P1, "forward")


def test_rates_are_fitted_to_the_kernels_own_times(monkeypatch):
    used = Resources(120, 0, 65_536, "HGMMA")
    monkeypatch.setattr(entry, "usage", lambda *_: used)
    model = Model(H200, RATES[H200.name], lambda *_: used)
    run = {
        goals.PLAIN: ("forward", "sdpa"),
        goals.SSA: ("backward_keys", "ssa"),
        goals.SELECTIVE: ("votes", "selective"),
    }
    field = {case.name: contests.Contest(case) for case in (goals.P1, goals.P2)}
    launches = {}
    for name, contest in field.items():
        own = launches[name] = {(goals.DEAD, "forward"): 1.0, (goals.PLAIN, "delta"): 1.0}  # not what is fitted
        for provider, (kernel, variant) in run.items():
            own[provider, kernel] = model.kernel(kernel, variant, contest.case, configs(kernel, contest.case.D, 16)[0])
    found = entry._rates(field, launches, H200)
    assert found["points"] == 6
    assert found["misfit"] < 0.02


def test_what_the_tests_said_is_a_fact():
    done = Done(1, "...F [ 40%]\n.. [100%]\nFAILED tests/a.py::b - no\n1 failed, 5 passed in 2s\n", 2.2, False)
    assert _summary(done) == {"failed": 1, "passed": 5, "seconds": 2, "ended": "exit code 1"}
    stopped = Done(-9, "...F [ 40%]\n..", 9.0, True)
    assert _summary(stopped) == {"done": "40%", "seconds": 9, "ended": "stopped for lack of time"}


def test_limits_of_the_profile_are_kept(monkeypatch, capsys):
    run = script("run")
    now = iter([0.0, 0.0, 300.0, 450.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    done = []
    monkeypatch.setattr(run, "_run", lambda entry, *_: done.append(entry.name) or 0)
    wanted = [run.ENTRIES[name] for name in ("kernels", "llama_eager", "attention_eager")]
    assert run._run_all(wanted, "gpu", Path("nowhere")) == 0
    assert done == ["kernels", "llama_eager"]
    assert re.search(r"left out.*--only attention_eager", capsys.readouterr().err)
