"""A run: points of a sweep, at each of which attentions are measured side by side, within a budget of seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

import torch

from attnrewrite.bench.attentions import Attention
from attnrewrite.bench.case import DECODE, FORWARD, Case, Setting, flops
from attnrewrite.bench.clock import Tick, rounded, wall
from attnrewrite.bench.contest import NO_TIME, Contest, hold, reason
from attnrewrite.bench.memory import bounded
from attnrewrite.kernels.dense.choice import Kernels
from attnrewrite.kernels.tuning.clock import CudaClock
from attnrewrite.kernels.tuning.quantile import quantile

ROUNDS = 50
"""Enough for any median; slow cases end earlier, by their share of the budget."""
_FASTEST = {"cpu": 1e12, "cuda": 1e16}
"""FLOP/s of a core, or of a GPU, with room to grow: what at that rate takes too long is not even tried."""
_CALLS = 6
"""That are needed at least: one to see that it works, one for memory, one to warm up, three rounds."""


@dataclass(frozen=True)
class Row:
    """One attention in one pass at one point; numbers are None where ``why`` says what kept it from being measured.

    ms, p20, p80: median and spread of the time of a call, in milliseconds.
    tflops: TFLOP/s of plain attention over visible pairs, whatever is computed.
    gib: peak of memory beyond the inputs, the results included, in GiB.
    error: relative error (Euclidean norm) against float64, of the output, or in a backward pass of the gradients.
    ratio: median over rounds of this time over that of the run's first baseline.
    """

    point: Mapping[str, int]
    metric: str
    name: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    tflops: float | None = None
    gib: float | None = None
    error: float | None = None
    ratio: float | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the sizes of the point first."""
        own = asdict(self)
        point = own.pop("point")
        return {**point, "pass": own.pop("metric"), "name": own.pop("name"), **own}


@dataclass
class Bench:
    """What is to be measured, and the ``rows`` that were.

    points: sizes by axis of ``sweep.AXES``; baseline: the name among ``attentions`` that ratios divide by.
    """

    points: Sequence[Mapping[str, int]]
    attentions: Mapping[str, Attention]
    baseline: str
    passes: Sequence[str]
    device: torch.device
    dtype: torch.dtype
    causal: bool
    seconds: float
    kernels: Kernels = "auto"
    compiled: bool = True
    rows: list[Row] = field(default_factory=list)
    _speed: dict[tuple[str, str], float] = field(default_factory=dict)
    """Seconds per FLOP by (pass, name) at the last point, from which the next one is foreseen."""

    def run(self, tick: Tick) -> None:
        """Measure every point; after an interruption ``rows`` hold what was measured until then."""
        end = monotonic() + self.seconds
        groups = [[p for p in self.passes if p != DECODE], [p for p in self.passes if p == DECODE]]
        units = [(point, group) for point in self.points for group in groups if group]
        for done, (point, group) in enumerate(units):
            share = (end - monotonic()) * len(group) / sum(len(passes) for _, passes in units[done:])
            self._measure(point, group, end, share, lambda label, *_, done=done: tick(label, done, len(units)))
        tick("done", len(units), len(units))

    def _measure(self, point: Mapping[str, int], passes: list[str], end: float, share: float, tick: Tick) -> None:
        case = self._case(point, passes == [DECODE])
        contest = Contest(case)
        own = [FORWARD if metric == DECODE else metric for metric in passes]
        able = {name: each for name, each in self.attentions.items() if not self._lacking(contest, name, passes, end)}
        try:
            with bounded(self.device):
                if able:
                    setting = Setting(case, self.device, self.dtype, self.compiled, self.kernels)
                    clock = CudaClock() if self.device.type == "cuda" else wall
                    hold(contest, setting, able, clock, ROUNDS, tick, lambda: monotonic() > end, own, share)
        except Exception as cause:  # the inputs do not fit; those of the next point may
            contest.failures |= {(FORWARD, name): reason(cause) for name in able}
        finally:  # also after an interruption
            for metric, measured in zip(passes, own, strict=True):
                self.rows += [self._row(point, contest, metric, measured, name) for name in self.attentions]

    def _case(self, point: Mapping[str, int], step: bool) -> Case:
        """Return the case of a point, named by the sizes that vary."""
        name = ", ".join(f"{axis}={x}" for axis, x in point.items() if any(p[axis] != x for p in self.points))
        sizes = {"B": point["batch"], "H": point["heads"], "N": point["seq_len"], "D": point["head_dim"]}
        return Case(name or "attention", **sizes, causal=self.causal, groups=point["kv_heads"], step=step)

    def _lacking(self, contest: Contest, name: str, passes: Sequence[str], end: float) -> str | None:
        """Return, and note, why something is not tried: the device, or the time that the last point lets expect."""
        attention = self.attentions[name]
        least = 1 / self._fastest() if attention.every_pair else 0.0
        expected = sum(self._speed.get((metric, name), least) * flops(contest.case, metric) for metric in passes)
        why, now = attention.missing(self.device), monotonic()
        if why is None and now + _CALLS * expected > end:
            why = NO_TIME if now > end else f"{NO_TIME}, a call takes about {expected:.2g} s"
        if why is not None:
            contest.failures[FORWARD, name] = why
        return why

    def _fastest(self) -> float:
        """Return FLOP/s that nothing here exceeds."""
        return _FASTEST[self.device.type] * (torch.get_num_threads() if self.device.type == "cpu" else 1)

    def _row(self, point: Mapping[str, int], contest: Contest, metric: str, measured: str, name: str) -> Row:
        key = measured, name
        taken = contest.seconds.get(key)
        if taken is None:
            return Row(point, metric, name, why=contest.failure(*key) or "interrupted")
        p20, p50, p80 = (quantile(taken, part) for part in (0.2, 0.5, 0.8))
        rate = flops(contest.case, measured) / p50
        self._speed[metric, name] = 1 / rate
        base = contest.seconds.get((measured, self.baseline), [])
        ratios = [own / other for own, other in zip(taken, base, strict=False)]  # an interruption cuts one short
        return Row(
            point,
            metric,
            name,
            ms=rounded(p50 * 1e3),
            p20=rounded(p20 * 1e3),
            p80=rounded(p80 * 1e3),
            rounds=len(taken),
            tflops=rounded(rate / 1e12),
            gib=rounded(contest.memory[key] / 2**30),
            error=rounded(contest.errors[key]) if key in contest.errors else None,
            ratio=rounded(quantile(ratios, 0.5)) if ratios else None,
        )
