"""One case of the kernels' benchmark: everybody runs it, in turns; who fails is out, and says why."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from suite.figures import quantile, rounded
from suite.goals import EAGER_SELECTIVE, Case
from suite.measure import Clock, Tick, interleave
from suite.peers import FORWARD_ONLY, Run, Setting, exact, providers

FORWARD, BACKWARD = "forward", "backward"
_SELDOM = (EAGER_SELECTIVE,)
"""What takes so long that a few rounds must do."""


@dataclass
class Contest:
    """What was measured: seconds by (pass, provider), relative errors by provider, and failures by (pass, provider)."""

    case: Case
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    kernels: dict[tuple[str, str], float] = field(default_factory=dict)
    """Seconds of one launch by (provider, kernel)."""

    def records(self) -> list[dict[str, Any]]:
        """Return a line for everybody in every pass."""
        names = {*self.seconds, *self.failures}
        return [self._record(*name) for name in sorted(names, key=lambda x: (x[0] != FORWARD, x[1]))]

    def failure(self, metric: str, provider: str) -> str | None:
        """Return why a provider was not measured: there is no backward pass without a forward one."""
        return self.failures.get((metric, provider)) or self.failures.get((FORWARD, provider))

    def _record(self, metric: str, provider: str) -> dict[str, Any]:
        found: dict[str, Any] = {"inputs": self.case.name, "pass": metric, "provider": provider}
        taken = self.seconds.get((metric, provider))
        if taken is None:
            return {**found, "failure": self.failures[metric, provider]}
        p20, p50, p80 = (rounded(quantile(taken, part)) for part in (0.2, 0.5, 0.8))
        rate = rounded(flops(self.case, metric) / p50 / 1e12)
        figures = {"ms": rounded(p50 * 1e3), "p20": rounded(p20 * 1e3), "p80": rounded(p80 * 1e3), "TFLOP/s": rate}
        error = self.errors.get(provider) if metric == FORWARD else None
        return {**found, **figures, **({} if error is None else {"error": rounded(error)})}


def flops(case: Case, metric: str) -> float:
    """Return the FLOPs of plain attention over visible pairs; backward has five products for two."""
    pairs = case.N * (case.N + 1) / 2 if case.causal else case.N**2
    return 4 * case.B * case.H * pairs * case.D * (1.0 if metric == FORWARD else 2.5)


def hold(
    setting: Setting, clock: Clock, rounds: int, tick: Tick, enough: Callable[[], bool], profile: bool = False
) -> Contest:
    """Run a case. ``enough`` says when there is no time for a further provider; ``profile``: time single kernels."""
    contest = Contest(setting.case)
    makers = providers(setting.case)
    runs: dict[str, Run] = {}
    for done, (name, make) in enumerate(makers.items()):
        tick(f"{setting.case.name}: {name}", done, len(makers))
        if enough():
            contest.failures[FORWARD, name] = "left out: no time"
            continue
        run = _attempt(contest, FORWARD, name, partial(make, setting))
        out = run and _attempt(contest, FORWARD, name, run)
        if run is not None and out is not None:
            runs[name] = run
            contest.errors |= _attempt(contest, FORWARD, name, partial(_error, setting, name, out)) or {}
    _time(contest, FORWARD, runs, clock, rounds, tick, enough)
    backwards: dict[str, Run] = {}
    for name in runs:
        if name not in FORWARD_ONLY and (FORWARD, name) in contest.seconds and not enough():
            step = _attempt(contest, BACKWARD, name, partial(_backward, setting, runs[name]))
            if step is not None and _attempt(contest, BACKWARD, name, step) is not None:
                backwards[name] = step
    _time(contest, BACKWARD, backwards, clock, rounds, tick, enough)
    if profile:
        for name in runs:
            steps = [runs[name], *([backwards[name]] if name in backwards else [])]
            found = _attempt(contest, "by kernel", name, partial(_kernels, steps)) or {}
            contest.kernels |= {(name, kernel): seconds for kernel, seconds in found.items()}
    return contest


def reason(cause: BaseException) -> str:
    """Return the kind of an exception and the first line of what it says."""
    said = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {said[0][:160] if said else ''}".rstrip(": ")


def _attempt(contest: Contest, metric: str, name: str, act: Callable[[], Any]) -> Any:
    """Return what ``act`` does, or None after noting why it failed: a peer's failure is a result."""
    try:
        return act()
    except Exception as cause:
        contest.failures[metric, name] = reason(cause)
        traceback.clear_frames(cause.__traceback__)  # they hold tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _time(
    contest: Contest,
    metric: str,
    runs: Mapping[str, Run],
    clock: Clock,
    rounds: int,
    tick: Tick,
    enough: Callable[[], bool],
) -> None:
    guarded = {name: partial(_attempt, contest, metric, name, run) for name, run in runs.items()}
    often = {name: run for name, run in guarded.items() if name not in _SELDOM}
    seldom = {name: run for name, run in guarded.items() if name in _SELDOM}
    for cases, count in ((often, rounds), (seldom, min(rounds, 3))):
        if cases and not enough():
            try:
                taken = interleave(cases, count, tick, f"{contest.case.name}: {metric}", clock)
            except Exception as cause:  # the device itself is out of order
                contest.failures |= {(metric, name): reason(cause) for name in cases}
                continue
            contest.seconds |= {(metric, n): x for n, x in taken.items() if (metric, n) not in contest.failures}
    for name in runs:
        if (metric, name) not in contest.seconds:
            contest.failures.setdefault((metric, name), "left out: no time")


def _backward(setting: Setting, run: Run) -> Callable[[], Any]:
    out = run()
    return lambda: torch.autograd.grad(out, setting.tensors, setting.upstream, retain_graph=True)


def _error(setting: Setting, name: str, out: Tensor) -> dict[str, float]:
    """Return the relative error against float64, where there is a formula."""
    true = exact(setting, name)
    if true is None:
        return {}
    found = out.detach()[:1, :2].double()
    return {name: float((found - true).norm() / true.norm())}


def _kernels(steps: list[Run]) -> dict[str, float]:
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
