"""One case: everybody runs it, in turns; who fails is out, and says why."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from attnrewrite import functional
from attnrewrite.bench.attentions import Attention, Maker, UnsupportedError
from attnrewrite.bench.case import BACKWARD, BOTH, FORWARD, Attend, Case, Setting
from attnrewrite.bench.clock import LEAST_ROUNDS, Clock, Tick, interleave
from attnrewrite.bench.memory import peak, too_much
from attnrewrite.kernels.diagnostics import AttnRewriteError

Run = Callable[[], Tensor]
NO_TIME = "left out: no time"
_CHECKED = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Visible pairs of a batch entry's heads up to which errors are taken, which costs a pass in float64."""


@dataclass
class Contest:
    """What was measured, by (pass, name): seconds, relative errors, bytes beyond the inputs, and failures."""

    case: Case
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    memory: dict[tuple[str, str], int] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def failure(self, metric: str, name: str) -> str | None:
        """Return why something was not measured: there is no backward pass without a forward one."""
        return self.failures.get((metric, name)) or self.failures.get((FORWARD, name))

    def attempt(self, metric: str, name: str, act: Callable[[], Any]) -> Any:
        """Return what ``act`` does, or None after noting why it failed: a failure is a result."""
        try:
            return act()
        except Exception as cause:
            self.failures[metric, name] = reason(cause)
            traceback.clear_frames(cause.__traceback__)  # they hold tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def reason(cause: BaseException) -> str:
    """Return the kind of an exception and the first line of what it says."""
    memory = too_much(cause)
    if memory:
        return memory
    if isinstance(cause, UnsupportedError):
        return str(cause)
    if isinstance(cause, AttnRewriteError):
        return f"{cause.code}: {cause.detail}"
    said = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {said[0][:160] if said else ''}".rstrip(": ")


def hold(
    contest: Contest,
    setting: Setting,
    attentions: Mapping[str, Attention],
    clock: Clock,
    rounds: int,
    tick: Tick,
    enough: Callable[[], bool],
    passes: Sequence[str] = (FORWARD, BACKWARD),
    seconds: float = inf,
    seldom: Sequence[str] = (),
) -> dict[str, list[Callable[[], object]]]:
    """Run a case and fill ``contest``; return what was run in each pass, by name.

    Forward passes keep what a backward pass needs. ``enough`` says when there is no time for anybody further,
    ``seconds`` how long it should take altogether, though some rounds are always made; those in ``seldom`` get three.
    """
    runs: dict[str, Run] = {}
    end = monotonic() + seconds
    for done, (name, attention) in enumerate(attentions.items()):
        tick(f"{setting.case.name}: {name}", done, len(attentions))
        why = attention.missing(setting.device) or (NO_TIME if enough() else None)
        if why:
            contest.failures[FORWARD, name] = why
            continue
        run = contest.attempt(FORWARD, name, partial(_prepared, attention, setting))
        out = run and contest.attempt(FORWARD, name, run)
        if run is not None and out is not None:
            runs[name] = run
    ran: dict[str, list[Callable[[], object]]] = {name: [] for name in runs}
    for remaining, metric in zip(range(len(passes), 0, -1), passes, strict=True):
        steps: dict[str, Callable[[], object]] = {}
        planned = 0.0
        for name, run in runs.items():
            if attentions[name].forward_only and metric != FORWARD:
                contest.failures[metric, name] = "has no backward pass"
            elif enough():
                contest.failures.setdefault((metric, name), NO_TIME)
            elif contest.failure(metric, name) is None:
                step = contest.attempt(metric, name, partial(_step, metric, setting, run))
                start = monotonic()
                taken = step and contest.attempt(metric, name, partial(peak, step, setting.device))
                once = monotonic() - start
                if taken is None:
                    continue
                contest.memory[metric, name] = taken
                ran[name].append(step)
                if monotonic() + planned + (1 + LEAST_ROUNDS) * once > end:
                    contest.failures[metric, name] = f"{NO_TIME}, a call takes about {once:.2g} s"
                else:
                    steps[name], planned = step, planned + (1 + LEAST_ROUNDS) * once
        often = {name: step for name, step in steps.items() if name not in seldom}
        rare = {name: step for name, step in steps.items() if name in seldom}
        for cases, count in ((often, rounds), (rare, min(rounds, 3))):
            share = (end - monotonic()) / (2 * remaining)  # half for errors, and for what later passes do first
            _time(contest, metric, cases, clock, count, tick, enough, share)
    _check_all(contest, setting, attentions, runs, passes, enough)
    return ran


def _check_all(
    contest: Contest,
    setting: Setting,
    attentions: Mapping[str, Attention],
    runs: Mapping[str, Run],
    passes: Sequence[str],
    enough: Callable[[], bool],
) -> None:
    """Note the errors of everybody, last, as they matter least where time is short."""
    formulas: dict[Maker, list[Tensor]] = {}
    for name, run in runs.items():
        if not enough():
            act = partial(_check, contest, setting, name, attentions[name], run, passes, formulas)
            contest.attempt("error", name, act)


def _prepared(attention: Attention, setting: Setting) -> Run:
    attend = attention.make(setting)
    return lambda: _call(attend, setting)


def _call(attend: Attend, setting: Setting) -> Tensor:
    with functional.kernels(setting.kernels):
        return attend(*setting.tensors)


def _step(metric: str, setting: Setting, run: Run) -> Callable[[], object]:
    if metric == FORWARD:
        return run
    if metric == BOTH:
        return lambda: _gradients(setting, run(), keep=False)
    out = run()
    return lambda: _gradients(setting, out)


def _gradients(setting: Setting, out: Tensor, keep: bool = True) -> tuple[Tensor | None, ...]:
    """Return the gradients by query, key and value; None by what an attention does not read."""
    if not out.requires_grad:
        raise UnsupportedError(f"its output does not require grad: it has no backward pass on {setting.device.type}")
    return torch.autograd.grad(out, setting.tensors, setting.upstream, retain_graph=keep, allow_unused=True)


def _check(
    contest: Contest,
    setting: Setting,
    name: str,
    attention: Attention,
    run: Run,
    passes: Sequence[str],
    known: dict[Maker, list[Tensor]],
) -> None:
    """Note the relative errors against float64, of the output and of all gradients together."""
    if attention.formula is None:
        return
    twin = setting.exact(attention.heads)
    if twin.case.H * twin.case.pairs > _CHECKED[setting.device.type]:
        return
    out = run()
    backward = out.requires_grad and any(metric != FORWARD for metric in passes)
    if attention.formula not in known:
        exact = _call(attention.formula(twin), twin)
        known[attention.formula] = [exact.detach(), *(_present(_gradients(twin, exact)) if backward else ())]
    true = known[attention.formula]
    found = [out.detach(), *(_present(_gradients(setting, out)) if backward else ())]
    contest.errors[FORWARD, name] = _error(found[:1], true[:1])
    if backward and len(true) > 1:
        contest.errors[BACKWARD, name] = _error(found[1:], true[1:])


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    off = size = 0.0
    for a, b in zip(found, true, strict=True):
        part = a[: b.shape[0], : b.shape[1]].double()
        off += float((part - b).square().sum())
        size += float(b.square().sum())
    return (off / size) ** 0.5 if size else float(off > 0)


def _time(
    contest: Contest,
    metric: str,
    steps: Mapping[str, Callable[[], object]],
    clock: Clock,
    rounds: int,
    tick: Tick,
    enough: Callable[[], bool],
    seconds: float,
) -> None:
    guarded = {name: partial(contest.attempt, metric, name, step) for name, step in steps.items()}
    taken: dict[str, list[float]] = {}
    end = monotonic() + seconds
    label = f"{contest.case.name}: {metric}"
    try:
        if guarded:
            interleave(guarded, rounds, tick, label, clock, enough=lambda: enough() or monotonic() > end, taken=taken)
    except Exception as cause:  # the device itself is out of order
        contest.failures |= {(metric, name): reason(cause) for name in guarded}
    finally:  # also after an interruption
        found = {(metric, name): x for name, x in taken.items() if x and (metric, name) not in contest.failures}
        contest.seconds |= found
    for name in steps:
        if (metric, name) not in contest.seconds:
            contest.failures.setdefault((metric, name), NO_TIME)
