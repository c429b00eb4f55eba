"""The search for configurations, on simulated devices of which the truth is known."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from attnrewrite.kernels.tuning.published import RATES
from attnrewrite.kernels.tuning.search import EFFORTS, Problem, search
from suite.figures import Figure, Goal, Result
from suite.simulated import H200, NOISES, Noise, SimulatedGPU, jitter, problems

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from attnrewrite.kernels.dense.configs import Config
    from suite.registry import Size

NOTE = (
    "Nothing is compiled or run. A simulated device has a true time for every configuration: the cost model's with "
    "rates that the search does not know, times a factor that no model knows, log-normal, drawn once for each "
    "configuration with the sigma in the case (the model is 0.08 off on published times); resources differ from the "
    "estimates by 10 percent. Runs add noise: calm (0.5 percent), rough (3), spiky (a run in twenty takes up to three "
    "times as long), drifting (5 percent in two seconds), two clocks (6 percent apart): all make a run slower. Jitter "
    "errs both ways, by half a percent. Means are geometric, over all "
    "kernels, of the true time of what was chosen over that of the best of the whole space. The tuners of one kernel "
    "have noises and seeds of their own."
)
GOALS = {"full": Goal("<=", 1.05), "model": Goal("<=", 1.15)}
METRICS = {"full": "12 timed at most", "quick": "4 timed at most", "model": "none timed"}


def run(size: Size, tick: Tick) -> Result:
    result = Result(notes=[NOTE])
    wanted = list(problems(size["kernels"]))
    for sigma in size["sigmas"]:
        for effort in EFFORTS:
            ratios = []
            for number, problem in enumerate(wanted):
                tick(f"{effort}, sigma {sigma}", number, len(wanted))
                noise = list(NOISES.values())[number % len(NOISES)]
                gpu = SimulatedGPU(problem, noise, number, sigma)
                ratios.append(gpu.seconds(_chosen(gpu, effort)) / gpu.best())
            case = f"{len(wanted)} kernels, sigma {sigma}"
            mean, timed = math.exp(statistics.fmean(map(math.log, ratios))), METRICS[effort]
            result.figures += [
                Figure(case, "chosen / best", f"{timed}, mean", "x", [mean], 1.0, GOALS.get(effort)),
                Figure(case, "chosen / best", f"{timed}, worst", "x", [max(ratios)], 1.0),
            ]
    slower: list[Noise] = list(NOISES.values())
    kinds = {"kernels with the same winner": slower, "the same, with jitter": [*slower, jitter]}
    result.figures += [_agreement(metric, wanted, size["tuners"], noises, tick) for metric, noises in kinds.items()]
    return result


def _agreement(metric: str, wanted: list[Problem], tuners: int, kinds: list[Noise], tick: Tick) -> Figure:
    """Tune every kernel several times, and count those for which all choose the same."""
    agreed = []
    for number, problem in enumerate(wanted):
        tick("agreement", number, len(wanted))
        gpus = [SimulatedGPU(problem, kinds[i % len(kinds)], tuners * number + i, 0.08) for i in range(tuners)]
        agreed.append(100.0 * (len({_chosen(gpu, "full") for gpu in gpus}) == 1))
    share = sum(agreed) / len(agreed)
    case = f"{len(wanted)} kernels, {tuners} tuners"
    return Figure(case, "attnrewrite", metric, "%", [share], goal=Goal(">=", 100.0))


def _chosen(gpu: SimulatedGPU, effort: str) -> Config:
    found = search(gpu.problem, gpu, H200, RATES[H200.name], EFFORTS[effort], clock=gpu.clock).winner
    assert found is not None
    return found
