"""Kernels: the tests on this GPU, then everybody's time at every case, and from that the goals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
import torch._functorch.config

from attnrewrite.bench.case import FORWARD, Case, Setting, flops
from attnrewrite.bench.clock import rounded, wall
from attnrewrite.bench.contest import Contest, hold, reason
from attnrewrite.bench.memory import peak
from attnrewrite.functional import kernels
from attnrewrite.kernels.tuning.calibration import Point, fit, misfit
from attnrewrite.kernels.tuning.clock import CudaClock
from attnrewrite.kernels.tuning.cost import Rates
from attnrewrite.kernels.tuning.device import H200, Device, present
from attnrewrite.kernels.tuning.published import RATES
from attnrewrite.kernels.tuning.quantile import quantile
from suite.beforehand import beforehand
from suite.figures import Figure, Goal, Result, ratio
from suite.goals import CASES, EAGER_SELECTIVE, GOALS, MEMORY, PLAIN, SELECTIVE, SSA, Aim
from suite.model import Model, shape
from suite.peers import passes, providers
from suite.roofline import Dot, roofline
from suite.usage import usage

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size

PREDICTIONS = Path(__file__).parents[2] / "results" / "predictions.json"
_ENOUGH = 20
"""Seconds at the end in which nothing new is begun."""
_CALIBRATING = 15
"""Seconds that must be left to read off what kernels use, and to fit."""
_SELDOM = (EAGER_SELECTIVE,)
"""What takes so long that a few rounds must do."""
_OF = {PLAIN: "sdpa", SSA: "ssa", SELECTIVE: "selective"}
NOTE = (
    "Inputs are [B, H, N, D], normally distributed; P1 and P2 are causal. All providers of a case run in turns, in "
    "this process, each time on a cold cache; times are those of the device between two events, and a ratio is taken "
    "round by round. FlexAttention is tuned to its maximum (max-autotune-no-cudagraphs, no dynamic shapes), with and "
    "without USE_TMA, the faster one counts; its block mask is made beforehand. TFLOP/s are those of plain attention "
    "over visible pairs, backward 2.5 times as many, whatever a provider computes. Errors are relative, against "
    "float64, of the first two heads. Predictions are those of docs/kernels.md."
)


def run(size: Size, tick: Tick) -> Result:
    start = time.monotonic()
    cuda = size["device"] == "cuda"
    torch._dynamo.config.recompile_limit = 64  # one function of flex_attention's serves all who compile it
    torch._functorch.config.donated_buffer = False  # backward runs many times over one graph
    result = Result(notes=[NOTE])
    device = present() if cuda else H200
    result.facts["device"] = str(device)
    tick("tests, and compiling", 0, 1)
    result.facts |= beforehand(size["beforehand"], cuda)

    def left() -> float:
        return float(size["seconds"] - (time.monotonic() - start))

    contests: dict[str, Contest] = {}
    launches: dict[str, dict[tuple[str, str], float]] = {}
    for name in dict.fromkeys(aim.case.name for aim in GOALS if aim.case != MEMORY):
        torch._dynamo.reset()
        sizes = size["cases"].get(name)
        case = CASES[name] if sizes is None else CASES[name]._replace(**dict(zip("BHND", sizes, strict=True)))
        try:
            dtype = getattr(torch, size["dtype"])
            setting = Setting(case, torch.device(size["device"]), dtype, size["compiled"], "triton")
            contests[name] = contest = Contest(case)
            clock = CudaClock() if cuda else wall
            ran = hold(
                contest,
                setting,
                providers(case),
                clock,
                size["rounds"],
                tick,
                lambda: left() < _ENOUGH,
                passes(case),
                seldom=_SELDOM,
            )
            if cuda:
                launches[name] = _launches(contest, ran)
        except Exception as cause:  # what was measured before is worth more than this case
            result.notes.append(f"{name} was not measured: {reason(cause)}")
    memory, why = _memory() if cuda else (None, "there is no CUDA device")
    result.facts["providers"] = [record for contest in contests.values() for record in _records(contest)]
    result.figures = [*_times(contests, device), *_ratios(contests, memory)]
    result.facts["goals"] = [_goal(aim, contests.get(aim.case.name), memory, why) for aim in GOALS]
    if cuda and left() > _CALIBRATING:
        result.facts["rates"] = _rates(contests, launches, device)
    result.drawing = roofline(f"Attention on {device.name}", device, (64, 128), _dots(contests))
    return result


def _records(contest: Contest) -> list[dict[str, Any]]:
    """Return a line for everybody in every pass."""
    names = sorted({*contest.seconds, *contest.failures}, key=lambda x: (x[0] != FORWARD, x[1]))
    return [_record(contest, *name) for name in names]


def _record(contest: Contest, metric: str, provider: str) -> dict[str, Any]:
    found: dict[str, Any] = {"inputs": contest.case.name, "pass": metric, "provider": provider}
    key = metric, provider
    taken = contest.seconds.get(key)
    if taken is None:
        return {**found, "failure": contest.failures[key]}
    p20, p50, p80 = (rounded(quantile(taken, part)) for part in (0.2, 0.5, 0.8))
    rate = rounded(flops(contest.case, metric) / p50 / 1e12)
    figures = {"ms": rounded(p50 * 1e3), "p20": rounded(p20 * 1e3), "p80": rounded(p80 * 1e3), "TFLOP/s": rate}
    error = contest.errors.get(key)
    return {**found, **figures, **({} if error is None else {"error": rounded(error)})}


def _launches(contest: Contest, ran: Mapping[str, list[Callable[[], object]]]) -> dict[tuple[str, str], float]:
    """Return the seconds of one launch of every generated kernel by (provider, kernel)."""
    found = {}
    for name, steps in ran.items():
        own = contest.attempt("by kernel", name, partial(_kernels, steps)) or {}
        found |= {(name, kernel): seconds for kernel, seconds in own.items()}
    return found


def _kernels(steps: list[Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of every generated kernel that the steps launch, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    from attnrewrite.kernels.dense.catalogue import KERNELS

    names = {template.function: name for name, template in KERNELS.items()}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for step in steps:
            for _ in range(3):
                step()
        torch.cuda.synchronize()
    return {names[x.key]: x.device_time / 1e6 for x in seen.key_averages() if x.key in names}


def _times(contests: Mapping[str, Contest], device: Device) -> list[Figure]:
    found = []
    for contest in contests.values():
        for (metric, name), seconds in contest.seconds.items():
            floor = flops(contest.case, metric) / device.matmul * 1e3 if name in _OF else None
            found.append(Figure(_title(contest.case), name, metric, "ms", [x * 1e3 for x in seconds], floor))
    return found


def _ratios(contests: Mapping[str, Contest], memory: float | None) -> list[Figure]:
    found = []
    for aim in GOALS:
        goal = Goal("<=", aim.must)
        if aim.case == MEMORY:
            if memory is not None:
                found.append(Figure(_title(aim.case), aim.over, aim.metric, "GB", [memory / 1e9], goal=goal))
        elif aim.case.name in contests and (pair := _pair(aim, contests[aim.case.name])):
            found.append(ratio(_title(contests[aim.case.name].case), aim.metric, *pair, goal))
    return found


def _pair(aim: Aim, contest: Contest) -> tuple[tuple[str, list[float]], tuple[str, list[float]]] | None:
    """Return the two series of an aim, of its peers the fastest; None where one of them was not measured."""
    peers = [(name, contest.seconds[aim.metric, name]) for name in aim.under if (aim.metric, name) in contest.seconds]
    own = contest.seconds.get((aim.metric, aim.over))
    return ((aim.over, own), min(peers, key=lambda peer: quantile(peer[1], 0.5))) if own and peers else None


def _goal(aim: Aim, contest: Contest | None, memory: float | None, why: str) -> dict[str, Any]:
    """Return a line of the table of goals."""
    line: dict[str, Any] = {"inputs": aim.case.name, "pass": aim.metric, "ratio": aim.text, "measured": "not measured"}
    if aim.case == MEMORY:
        line |= {"measured": rounded(memory / 1e9)} if memory is not None else {"why": why}
    elif contest is None:
        line["why"] = "see the notes"
    elif pair := _pair(aim, contest):
        line["measured"] = rounded(ratio("", "", *pair, None).median)
    else:
        said = {name: contest.failure(aim.metric, name) for name in (aim.over, *aim.under)}
        line["why"] = "; ".join(f"{name}: {text}" for name, text in said.items() if text)
    known = {(x["case"], x["metric"], x["what"]): x for x in _predictions()}
    expected = known.get((aim.case.name, aim.metric, aim.text), {})
    more = {"must": aim.must, "target": aim.target, **{x: expected.get(x) for x in ("predicted", "floor")}}
    return {**line, **more} if "why" not in line else {**line, **more, "why": line["why"]}


def _predictions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(PREDICTIONS.read_text(encoding="utf-8"))["goals"]
    return found


def _memory() -> tuple[float | None, str]:
    """Return the bytes that selective attention takes beyond inputs and output, or why that is not known."""
    try:
        setting = Setting(MEMORY, torch.device("cuda"), torch.bfloat16, compiled=False)
        attend = providers(MEMORY)[SELECTIVE].make(setting)
        with kernels("triton"):
            taken = peak(lambda: attend(*setting.tensors), setting.device)
        return taken - setting.query.numel() * setting.query.element_size(), ""
    except Exception as cause:
        return None, reason(cause)


def _rates(
    contests: Mapping[str, Contest], launches: Mapping[str, Mapping[tuple[str, str], float]], device: Device
) -> dict[str, Any]:
    """Return the rates that fit the kernels' own times: what ``published.RATES`` should say of this device."""
    points = []
    model = Model(device, RATES.get(device.name, Rates()), usage)
    try:
        for name, contest in contests.items():
            for (provider, kernel), seconds in launches.get(name, {}).items():
                variant, case = _OF.get(provider), contest.case
                if variant is not None and kernel != "delta":
                    config = model.untuned(kernel, variant, case)
                    used = usage(kernel, variant, case.D, config, device.target, case.causal)
                    points.append(Point(kernel, config, shape(case, variant), used, seconds))
        found = fit(points, device)
        return {**found._asdict(), "points": len(points), "misfit": rounded(misfit(points, device, found))}
    except Exception as cause:
        return {**Rates()._asdict(), "not fitted": reason(cause)}


def _dots(contests: Mapping[str, Contest]) -> list[Dot]:
    dots = []
    for contest in contests.values():
        case = contest.case
        moved = {FORWARD: 4.0}  # queries, keys, values, output; backward reads those and two more, and writes three
        for (metric, name), seconds in contest.seconds.items():
            work = flops(case, metric)
            least = moved.get(metric, 8.0) * case.B * case.H * case.N * case.D * 2
            label = f"{case.name} {metric}: {name}"
            dots.append(Dot(label, work / least, work / quantile(seconds, 0.5) / 1e12))
    return sorted(dots, key=lambda dot: -dot.rate)


def _title(case: Case) -> str:
    return f"{case.name} = ({case.B}, {case.H}, {case.N}, {case.D})"
