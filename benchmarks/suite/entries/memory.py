"""Memory: the peak of forward and backward, beyond the inputs, and how it grows with the length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from attnrewrite.bench import memory
from attnrewrite.bench.attentions import Attention
from attnrewrite.bench.case import Case, Setting
from suite.attentions import dense, ours
from suite.figures import Figure, Goal, Result

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size

DENSE, OURS = "dense", "attnrewrite"
GROWING = {"selective": 2.0, "ssa": 2.0, "symmetric": 2.0, "routing": 1.5, "sea": 1.5}
GIB = 1 << 30
NOTE = (
    "Each figure is the most that torch has allocated at once during one causal forward and backward, batch 1, "
    "float32, beyond the inputs. The floor is the output and three gradients. "
    "dense: the formula with whole score matrices, as eager models write it. The exponent e is that of the least "
    "squares fit of memory ~ N^e. Routing has N / 128 clusters and windows of 128, SEA 128 pixels and a budget of 64."
)


def run(size: Size, tick: Tick) -> Result:
    heads, width, whole = size["heads"], size["width"], size["length"]
    result = Result(notes=[NOTE])

    def peak(attention: Attention, length: int) -> float:
        case = Case("", 1, heads, length, width)
        setting = Setting(case, torch.device("cpu"), torch.float32, compiled=False)
        attend = attention.make(setting)
        return memory.peak(lambda: attend(*setting.tensors).sum().backward(), setting.device)

    case = f"selective, N = {whole}, H = {heads}, D = {width}"
    floor = 4 * 4 * heads * whole * width
    tick(case, 0, 2)
    whole_matrices = peak(dense("selective"), whole)
    tick(case, 1, 2)
    own = peak(ours("selective", whole), whole)
    for name, taken in ((DENSE, whole_matrices), (OURS, own)):
        result.figures.append(Figure(case, name, "peak beyond inputs", "GiB", [taken / GIB], floor / GIB))
    ratio = Figure(case, f"{DENSE} / {OURS}", "peak beyond inputs", "x", [whole_matrices / own], goal=Goal(">=", 8.0))
    result.figures.append(ratio)
    lengths = size["lengths"]
    for turn, (name, limit) in enumerate(GROWING.items()):
        tick(f"growth of {name}", turn, len(GROWING))
        taken = [peak(ours(name, length), length) for length in lengths]
        case = f"{name}, N = {lengths[0]} to {lengths[-1]}"
        result.figures.append(Figure(case, OURS, "peak at the longest", "GiB", [taken[-1] / GIB]))
        slope = Figure(case, OURS, "exponent of growth", "1", [_slope(lengths, taken)], goal=Goal("<=", limit))
        result.figures.append(slope)
    return result


def _slope(lengths: list[int], taken: list[float]) -> float:
    points = [(math.log(n), math.log(max(x, 1.0))) for n, x in zip(lengths, taken, strict=True)]
    mean = [sum(axis) / len(points) for axis in zip(*points, strict=True)]
    along = sum((x - mean[0]) ** 2 for x, _ in points)
    return sum((x - mean[0]) * (y - mean[1]) for x, y in points) / along
