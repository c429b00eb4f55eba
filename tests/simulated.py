"""Tuning on a GPU that does not exist, which the benchmarks have: see ``benchmarks/suite/simulated.py``."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from suite.simulated import STORED, SimulatedGPU  # found through the path above

from attnrewrite.kernels.dense.configs import configs
from attnrewrite.kernels.dense.keys import Where
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.tuning.device import H200
from attnrewrite.kernels.tuning.search import Problem
from attnrewrite.kernels.tuning.tasks import of_recipe, recipes
from attnrewrite.tuning import Place, Session

HERE = Where("3.7.1", "sm_90", STORED)
CPU = torch.device("cpu")
PLACE = Place(CPU, HERE, H200)


def tasks_of(variant, **changes):
    call = {"B": 1, "H": 4, "Hkv": 2, "D": 32, "Dv": 32, "dtype": "bfloat16", "causal": True}
    call |= {"lengths": (256,), "learns": True, "step": True, **changes}
    return [task for recipe in recipes(variant, **call) for task in of_recipe(recipe, CPU, HERE)]


class Benches:
    """A simulated device for each task; remembers them."""

    def __init__(self, kind=SimulatedGPU):
        self.made, self.kind = [], kind

    def __call__(self, task):
        space = SPACES[task.key.kernel]
        first = configs(task.key.kernel, 32, 16)[0]
        self.made.append(self.kind(Problem(task.key, task.shape, space, first)))
        return self.made[-1]

    @property
    def timed(self):
        return sum(len(gpu.timed) for gpu in self.made)


def session(of, benches, **more):
    return Session(of, PLACE, bench=benches, **more)


def silent(text, done):
    pass
