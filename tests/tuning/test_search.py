"""The search on a device that does not exist: its true times are known."""

import math
import statistics

import pytest
import simulated  # noqa: F401  # puts the benchmarks on the path
from suite.simulated import H200, NOISES, SimulatedGPU, problems, spiky

from attnrewrite.kernels.store.key import pairs
from attnrewrite.kernels.tuning.cost import occupancy
from attnrewrite.kernels.tuning.halving import Rung
from attnrewrite.kernels.tuning.published import RATES
from attnrewrite.kernels.tuning.search import EFFORTS, BenchError, search

BELIEVED = RATES[H200.name]
ALL = list(problems(100))
FULL = EFFORTS["full"]


def found(problem, gpu, effort="full", **more):
    return search(problem, gpu, H200, BELIEVED, EFFORTS[effort], clock=gpu.clock, **more)


def ratios(effort, sigma=0.08):
    """Chosen over the best of everything, by the true times."""
    for number, problem in enumerate(ALL):
        gpu = SimulatedGPU(problem, list(NOISES.values())[number % len(NOISES)], number, sigma)
        outcome = found(problem, gpu, effort)
        assert len(set(gpu.timed)) <= (12 if effort == "full" else 4 if effort == "quick" else 0)
        assert len(gpu.compiled) <= EFFORTS[effort].compiled
        yield gpu.seconds(outcome.winner) / gpu.best()


@pytest.mark.parametrize(("effort", "most"), [("full", 1.05), ("quick", 1.1), ("model", 1.15)])
def test_what_is_chosen_is_near_the_best_of_all(effort, most):
    assert math.exp(statistics.fmean(map(math.log, ratios(effort)))) <= most


def test_independent_tuners_choose_the_same():
    for number, problem in enumerate(ALL):
        kinds = list(NOISES.values())
        gpus = [SimulatedGPU(problem, kinds[i % len(kinds)], 8 * number + i, 0.08) for i in range(8)]
        assert len({found(problem, gpu).winner for gpu in gpus}) == 1


def test_nothing_that_spills_or_does_not_fit_is_timed():
    for problem in ALL:
        gpu = SimulatedGPU(problem)
        found(problem, gpu)
        assert all(gpu.used(config).spills == 0 and occupancy(config, gpu.used(config), H200) for config in gpu.timed)


def test_the_first_configuration_is_always_among_those_timed():
    """So that tuning never makes anything slower than it was, noise apart."""
    for problem in ALL[:12]:
        gpu = SimulatedGPU(problem)
        outcome = found(problem, gpu)
        if outcome.timings[problem.first].status == "ok":
            assert problem.first in gpu.timed
            assert gpu.seconds(outcome.winner) <= gpu.seconds(problem.first) * 1.03


@pytest.mark.parametrize("way", ["failed", "wrong", "fault"])
def test_a_broken_candidate_costs_only_itself(way):
    problem = ALL[0]
    best = found(problem, SimulatedGPU(problem)).winner
    gpu = SimulatedGPU(problem, broken={best: way})
    outcome = found(problem, gpu)
    assert outcome.winner != best
    assert best not in gpu.timed
    assert outcome.timings[best].status == way
    assert outcome.timings[outcome.winner].status == "ok"


def test_one_that_breaks_while_it_is_timed_is_no_winner():
    problem = ALL[0]
    best = found(problem, SimulatedGPU(problem)).winner

    class Breaking(SimulatedGPU):
        def time(self, config):
            return None if config == best and len(self.timed) > 40 else super().time(config)

    outcome = found(problem, Breaking(problem))
    assert outcome.winner != best
    assert outcome.timings[best].status == "fault"


def test_where_everything_fails_nothing_is_chosen():
    problem = ALL[0]
    gpu = SimulatedGPU(problem, broken=dict.fromkeys(problem.space, "failed"))
    outcome = found(problem, gpu)
    assert outcome.winner is None
    assert outcome.record(problem.key, 0) is None


def test_where_everything_spills_what_spills_least_is_taken():
    class Narrow(SimulatedGPU):
        def used(self, config):
            used = super().used(config)
            return type(used)(255, 10 + config.block_m, used.shared, used.matrix)

    problem = ALL[0]
    outcome = found(problem, Narrow(problem))
    assert outcome.winner is not None
    assert outcome.timings[outcome.winner].spills == min(x.spills for x in outcome.timings.values())


def test_what_was_timed_survives_an_interruption():
    problem, kept = ALL[0], []

    class Interrupted(SimulatedGPU):
        def time(self, config):
            if len(self.timed) == 30:
                raise KeyboardInterrupt
            return super().time(config)

    with pytest.raises(KeyboardInterrupt):
        found(problem, Interrupted(problem), keep=kept.append)
    record = kept[0].record(problem.key, 1)
    assert sum(timing.n for timing in record.timings) == 30
    assert dict(record.winner) == kept[0].winner._asdict()


def test_time_is_up():
    problem = ALL[0]
    gpu = SimulatedGPU(problem)
    effort = FULL._replace(seconds=8.5)
    outcome = search(problem, gpu, H200, BELIEVED, effort, clock=gpu.clock)
    assert outcome.stopped == "no more time"
    assert outcome.seconds < 9
    assert outcome.winner is not None


def test_a_bench_that_cannot_go_on_keeps_what_there_is():
    problem = ALL[0]

    class Lost(SimulatedGPU):
        def check(self, config):
            if len(self.timed) == 0 and self.now > 7.4:
                raise BenchError("the device is gone")
            return super().check(config)

    outcome = found(problem, Lost(problem))
    assert outcome.stopped == "the device is gone"


def test_what_failed_before_is_not_compiled_again():
    problem = ALL[0]
    whole = SimulatedGPU(problem)
    found(problem, whole)
    broken = dict.fromkeys(whole.compiled[5:15], "failed")
    first = found(problem, SimulatedGPU(problem, broken=broken))
    failed = {config for config, timing in first.timings.items() if timing.status == "failed"}
    known = {timing.config: timing for timing in first.timings.values()}
    gpu = SimulatedGPU(problem)
    found(problem, gpu, known=known)
    assert failed
    assert not failed & set(gpu.compiled)


def test_an_outlier_throws_nothing_out():
    """The best one of a rung is kept though one of its runs met something else."""
    for seed in range(20):
        gpu = SimulatedGPU(ALL[20], spiky, seed + 500)
        assert gpu.seconds(found(ALL[20], gpu).winner) <= gpu.best() * 1.1


def test_a_record_holds_what_was_found():
    problem = ALL[0]
    outcome = found(problem, SimulatedGPU(problem))
    record = outcome.record(problem.key, 1_750_000_000.7, pairs({"torch": "2.13.0"}))
    assert record.winner == pairs(outcome.winner._asdict())
    assert record.time == 1_750_000_000
    assert 0.01 <= record.noise <= 0.02
    statuses = {timing.status for timing in record.timings}
    assert statuses <= {"ok", "pruned"}
    best = outcome.timings[outcome.winner]
    assert best.p20 <= best.median <= best.p80
    assert best.n >= Rung(*FULL.rungs[-1]).runs
