"""The search for the fastest configuration of one kernel.

The cost model ranks the declared space by estimated resources; the first are compiled ahead of time; what spills, does
not fit or is dominated is left out; the model ranks the rest by what they do use; the best are checked and timed by
successive halving. Nothing here touches a GPU: a ``Bench`` does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.store.key import Key, Pairs, pairs
from attnrewrite.kernels.store.record import Record, Status, Timing
from attnrewrite.kernels.tuning.cost import Rates, occupancy, predict
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.estimate import estimated
from attnrewrite.kernels.tuning.halving import Rung, halve
from attnrewrite.kernels.tuning.quantile import quantile
from attnrewrite.kernels.tuning.winner import winner
from attnrewrite.kernels.tuning.work import Shape


class Effort(NamedTuple):
    """How much a search may do: configurations to compile, rungs of timing, runs of the last ones, and seconds."""

    compiled: int
    rungs: tuple[Rung, ...]
    most_runs: int
    seconds: float


EFFORTS = {
    "model": Effort(24, (), 0, 60.0),
    "quick": Effort(8, (Rung(4, 3), Rung(2, 10)), 40, 20.0),
    "full": Effort(24, (Rung(12, 8), Rung(4, 16), Rung(2, 40)), 2400, 120.0),
}
"""By the mode of tuning; "model" times nothing."""


_DOUBTFUL = 60
"""Registers that spill, as estimated: with so few the compiler may yet do without."""


class Problem(NamedTuple):
    """One kernel for calls of one size. ``first`` is considered in any case, where there is such a configuration."""

    key: Key
    shape: Shape
    space: Iterable[Config]
    first: Config | None


class Bench(Protocol):
    """What compiles, checks and times a kernel."""

    def compile(self, configs: Sequence[Config], seconds: float) -> Mapping[Config, Resources | None]:
        """Compile in parallel, ahead of time; None for what fails, nothing for what there was no time for."""

    def check(self, config: Config) -> Status:
        """Run on a slice, and compare the results."""

    def time(self, config: Config) -> float | None:
        """Return the seconds of one run with a cold cache; None where it fails."""


class BenchError(Exception):
    """A bench cannot go on."""


@dataclass
class Outcome:
    """What a search found: timings of this search alone, the configuration to run, and how it went."""

    timings: dict[Config, Timing] = field(default_factory=dict)
    used: dict[Config, Resources] = field(default_factory=dict)
    winner: Config | None = None
    band: float = 0.0
    compiled: int = 0
    timed: int = 0
    seconds: float = 0.0
    stopped: str = ""
    """Why it ended early, empty where it did not."""

    def record(self, key: Key, now: float, origin: Pairs = ()) -> Record | None:
        """Return it as a record; None where nothing was timed."""
        chosen = None if self.winner is None else self.timings.get(self.winner)
        if chosen is None or chosen.status != "ok":
            return None
        return Record(key, tuple(self.timings.values()), chosen.config, round(self.band, 4), 1, int(now), origin)


def search(
    problem: Problem,
    bench: Bench,
    device: Device,
    rates: Rates,
    effort: Effort,
    known: Mapping[Pairs, Timing] | None = None,
    clock: Callable[[], float] = time.monotonic,
    keep: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Find the fastest configuration.

    Args:
        problem: what is tuned.
        bench: what compiles and times it.
        device: where it runs, for the cost model.
        rates: what kernels reach there.
        effort: how much may be done.
        known: timings of earlier searches. What failed is not tried again, what was timed is not timed again unless it
            may win; what is missing is.
        clock: seconds.
        keep: gets what was found, also where the search is interrupted.
    """
    run = _Search(problem, bench, device, rates, effort, known or {}, clock)
    try:
        run.everything()
    finally:
        run.conclude()
        keep(run.outcome)
    return run.outcome


@dataclass
class _Search:
    problem: Problem
    bench: Bench
    device: Device
    rates: Rates
    effort: Effort
    known: Mapping[Pairs, Timing]
    clock: Callable[[], float]
    outcome: Outcome = field(default_factory=Outcome)
    samples: dict[Config, list[float]] = field(default_factory=dict)
    ranked: list[Config] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def everything(self) -> None:
        """Compile, leave out, rank, check and time."""
        try:
            self.compile()
            self.ranked = self.rank(self.pruned())
            if self.effort.rungs and self.ranked:
                self.measure()
        except BenchError as failure:
            self.outcome.stopped = str(failure)

    def compile(self) -> None:
        wanted = self.worth_compiling()
        found = self.bench.compile(wanted, max(0.0, self.effort.seconds / 2))
        self.outcome.compiled = len(found)
        for config, used in found.items():
            if used is None:
                self.note(config, "failed")
            else:
                self.outcome.used[config] = used

    def worth_compiling(self) -> list[Config]:
        """Return the first configuration, then what looks best by estimated resources; some may turn out to spill."""
        kernel, shape = self.problem.key.kernel, self.problem.shape
        default = self.problem.first
        first = [] if default is None or self.failed(default) else [default]
        guessed = []
        for config in self.problem.space:
            guess = estimated(kernel, config, shape)
            if guess.spills <= _DOUBTFUL and config not in first and not self.failed(config):
                guessed.append((self.predicted(config, guess), config, guess.spills > 0))
        ranked = [(config, doubtful) for seconds, config, doubtful in sorted(guessed) if seconds < math.inf]
        room = self.effort.compiled - len(first)
        doubtful = [config for config, doubted in ranked[:room] if doubted][: room // 3]
        safe = [config for config, doubted in ranked if not doubted]
        return first + safe[: room - len(doubtful)] + doubtful

    def failed(self, config: Config) -> bool:
        timing = self.known.get(pairs(config._asdict()))
        return timing is not None and timing.status != "ok"

    def pruned(self) -> list[Config]:
        """Return what neither spills nor is too large nor is dominated; where all spill, those that spill least."""
        fitting = {config: used for config, used in self.outcome.used.items() if self.resident(config)}
        least = min((used.spills for used in fitting.values()), default=0)
        kept = [config for config, used in fitting.items() if used.spills == least]
        kept = [config for config in kept if not self.dominated(config, kept)]
        for config in self.outcome.used:
            if config not in kept:
                self.note(config, "pruned")
        return kept

    def dominated(self, config: Config, others: Iterable[Config]) -> bool:
        """Whether it does not pipeline, where one that is the same otherwise does and leaves room for as many programs.

        Where stages make no difference to what is used, there was nothing to pipeline, and the fewest stages stand for
        all.
        """
        for other in others:
            if other != config and other._replace(stages=config.stages) == config:
                if self.outcome.used[other] == self.outcome.used[config]:
                    if other.stages < config.stages:
                        return True
                elif config.stages == 1 and self.resident(other) >= self.resident(config):
                    return True
        return False

    def resident(self, config: Config) -> int:
        return occupancy(config, self.outcome.used[config], self.device)

    def rank(self, configs: Iterable[Config]) -> list[Config]:
        return sorted(configs, key=lambda config: (self.predicted(config, self.outcome.used[config]), config))

    def predicted(self, config: Config, used: Resources) -> float:
        return predict(self.problem.key.kernel, config, self.problem.shape, used, self.device, self.rates)

    def measure(self) -> None:
        wanted = self.ranked[: self.effort.rungs[0].candidates]
        default = self.problem.first
        if default is not None and default in self.ranked and default not in wanted:
            wanted[-1] = default
        candidates = []
        for config in wanted:
            status = self.bench.check(config) if self.in_time() else None
            if status == "ok":
                candidates.append(config)
            elif status is not None:
                self.note(config, status)
        self.outcome.timed = len(candidates)
        halve(
            candidates,
            self.outcome.used,
            self.effort.rungs,
            self.effort.most_runs,
            self.time,
            self.in_time,
            self.samples,
        )

    def time(self, config: Config) -> float | None:
        seconds = self.bench.time(config)
        if seconds is None:
            self.note(config, "fault")
        return seconds

    def in_time(self) -> bool:
        if self.clock() - self.start < self.effort.seconds:
            return True
        self.outcome.stopped = "no more time"
        return False

    def note(self, config: Config, status: Status) -> None:
        used = self.outcome.used.get(config)
        uses = (None, None, None) if used is None else (used.registers, used.spills, used.shared)
        self.outcome.timings[config] = Timing(pairs(config._asdict()), status, None, None, None, 0, *uses)

    def conclude(self) -> None:
        """Choose among what was timed most; where nothing was, take the model's first."""
        self.outcome.seconds = self.clock() - self.start
        for config, runs in self.samples.items():
            self.note(config, "ok")
            low, high = quantile(runs, 0.2), quantile(runs, 0.8)
            self.outcome.timings[config] = replace(
                self.outcome.timings[config],
                median=_ms(statistics.median(runs)),
                p20=_ms(low),
                p80=_ms(high),
                n=len(runs),
            )
        if not self.samples:
            self.outcome.winner = self.ranked[0] if self.ranked else None
            return
        most = max(map(len, self.samples.values()))
        last = {config: runs for config, runs in self.samples.items() if len(runs) >= most - 1}
        self.outcome.winner, self.outcome.band = winner(last, self.outcome.used)


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")
