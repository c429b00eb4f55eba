"""A GPU that does not exist: every configuration has a true time, and every run another one."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.store.key import Device, Key, bucket, pairs
from attnrewrite.kernels.store.record import Status
from attnrewrite.kernels.tuning.cost import Rates, occupancy, predict
from attnrewrite.kernels.tuning.device import H200
from attnrewrite.kernels.tuning.estimate import estimated
from attnrewrite.kernels.tuning.search import Problem
from attnrewrite.kernels.tuning.work import Shape

STORED = Device(H200.name, H200.sms, H200.shared_block, H200.l2)
TRUE_RATES = Rates(matmul=0.61, overlap=0.7, tile=6e-9, program=3.5e-6, launch=2e-6)
"""Not those that the search believes in."""


def drawn(*what: object) -> float:
    """Return a number in [0, 1) that is always the same for the same words."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7]) / 2**56


def normal(*what: object) -> float:
    """Return one from a normal distribution."""
    return math.sqrt(-2 * math.log(drawn(*what, 0) or 1e-17)) * math.cos(2 * math.pi * drawn(*what, 1))


Noise = Callable[[random.Random, float], float]
"""What a run takes, at this moment, over the truth."""


def calm(source: random.Random, moment: float) -> float:
    """Let the device do nothing else."""
    return 1 + abs(source.gauss(0, 0.005))


def rough(source: random.Random, moment: float) -> float:
    """Noise of 3 percent."""
    return 1 + abs(source.gauss(0, 0.03))


def spiky(source: random.Random, moment: float) -> float:
    """Let one run in twenty meet something else on the machine."""
    return (1 + abs(source.gauss(0, 0.01))) * (source.uniform(1.2, 3) if source.random() < 0.05 else 1)


def drifting(source: random.Random, moment: float) -> float:
    """Warm the chip up."""
    return (1 + abs(source.gauss(0, 0.01))) * (1 + 0.05 * (1 - math.exp(-moment / 2)))


def two_clocks(source: random.Random, moment: float) -> float:
    """Let the clock step down and up again."""
    return (1 + abs(source.gauss(0, 0.01))) * (1.06 if int(moment * 3) % 2 else 1)


def jitter(source: random.Random, moment: float) -> float:
    """Err both ways by half a percent."""
    return 1 + source.gauss(0, 0.005)


NOISES = {"calm": calm, "rough": rough, "spiky": spiky, "drifting": drifting, "two clocks": two_clocks}


@dataclass
class SimulatedGPU:
    """Compiles, checks and times on no device. ``sigma``: what no model knows about a configuration, in logarithms."""

    problem: Problem
    noise: Noise = calm
    seed: int = 0
    sigma: float = 0.05
    broken: Mapping[Config, Status] = field(default_factory=dict)
    now: float = 0.0
    timed: list[Config] = field(default_factory=list)
    compiled: list[Config] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source = random.Random(self.seed)

    def clock(self) -> float:
        """Return the time, which runs where something is done."""
        return self.now

    def used(self, config: Config) -> Resources:
        """Return what a program uses: not quite what is estimated."""
        guess = estimated(self.problem.key.kernel, config, self.problem.shape)
        wanted = round(guess.registers * math.exp(0.1 * normal(self.problem.key.source, str(config), "registers")))
        wanted += guess.spills
        return Resources(min(255, wanted), max(0, wanted - 255), guess.shared, guess.matrix)

    def seconds(self, config: Config) -> float:
        """Return the truth."""
        known = predict(self.problem.key.kernel, config, self.problem.shape, self.used(config), H200, TRUE_RATES)
        return known * math.exp(self.sigma * normal(self.problem.key.source, str(config), "time"))

    def best(self) -> float:
        """Return the truth about the best one: what a search that tries everything would find."""
        runs = [c for c in self.problem.space if occupancy(c, self.used(c), H200)]
        return min(map(self.seconds, runs))

    def compile(self, wanted: Sequence[Config], seconds: float) -> dict[Config, Resources | None]:
        """Take a while."""
        self.compiled += wanted
        self.now += 0.3 * len(wanted)
        return {c: None if self.broken.get(c) == "failed" else self.used(c) for c in wanted}

    def check(self, config: Config) -> Status:
        """Say what is broken."""
        self.now += 0.05
        return self.broken.get(config, "ok")

    def time(self, config: Config) -> float | None:
        """Return the time of a run."""
        seconds = self.seconds(config) * self.noise(self.source, self.now)
        self.now += 0.005 + seconds
        self.timed.append(config)
        return seconds


SHAPES = [
    (1, 8, 8, 512),
    (4, 16, 16, 4096),
    (2, 16, 16, 8192),
    (1, 32, 8, 2048),
    (8, 12, 12, 1024),
    (1, 4, 4, 16384),
]
LOOPS = ("forward", "backward_keys", "backward_queries", "votes", "backward_votes", "backward_shared")


def problems(count: int) -> Iterator[Problem]:
    """Yield kernels for calls of many kinds."""
    for number in range(count):
        name = LOOPS[number % len(LOOPS)]
        B, H, Hkv, N = SHAPES[number // len(LOOPS) % len(SHAPES)]
        width = (64, 128, 256)[(number // len(LOOPS) + number // (len(LOOPS) * len(SHAPES))) % 3]
        variant = number % 5
        shape = Shape(
            *(B, H, Hkv, N, N, width, width),
            causal=name != "backward_shared",
            penalty=name.endswith("votes") or variant == 1,
            temperatures=variant == 2 and not name.endswith("votes"),
        )
        of = Key(
            family="dense",
            kernel=name,
            source=f"{number:064x}",
            triton="3.7.1",
            target=H200.target,
            device=STORED,
            dtypes=("bf16",),
            dims=pairs({"D": width, "DV": width}),
            flags=pairs({"CAUSAL": shape.causal}),
            bucket=bucket({"heads": B * H, "L": N, "S": N}),
        )
        yield Problem(of, shape, SPACES[name], configs(name, width, 16)[0])
