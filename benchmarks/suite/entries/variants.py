"""Time: every attention of the library under inductor, against its dense form and torch's fused attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnrewrite.bench.case import Attend, Case, Setting
from attnrewrite.bench.clock import interleave
from attnrewrite.bench.peers import PEERS
from suite.attentions import NAMES, dense, ours
from suite.figures import Figure, Result, ratio

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size

OURS, DENSE, FUSED = "attnrewrite", "dense", "sdpa"
LONGEST_DENSE = 2048
NOTE = (
    "Causal self-attention, batch 1, float32, one thread; every provider is compiled by inductor except `dense`, which "
    "is the formula with whole score matrices in eager mode (for routing and SEA: of the attention that they replace), "
    f"and is run up to N = {LONGEST_DENSE}. sdpa is torch's fused attention, plain, so that it is the floor of what "
    "computes every pair. Routing has N / 128 clusters and windows of 128, SEA 128 pixels and a budget of 64; its "
    "estimator is not in it. Rounds are interleaved, and ratios are taken round by round."
)


def run(size: Size, tick: Tick) -> Result:
    """Time forward, and forward with backward, at every length."""
    result = Result(notes=[NOTE])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for length in size["lengths"]:
            for name in NAMES:
                _compare(name, length, size, tick, result)
    finally:
        torch.set_num_threads(before)
    return result


def _compare(name: str, length: int, size: Size, tick: Tick, result: Result) -> None:
    torch._dynamo.reset()
    case = f"{name}, N = {length}, H = {size['heads']}, D = {size['width']}"
    inputs = Case(case, 1, size["heads"], length, size["width"])
    setting = Setting(inputs, torch.device("cpu"), torch.float32, compiled=True)
    forms: dict[str, Attend] = {
        OURS: torch.compile(ours(name, length).make(setting)),
        FUSED: torch.compile(PEERS["sdpa"].make(setting)),
    }
    if length <= LONGEST_DENSE:
        forms[DENSE] = dense(name).make(setting)
    for metric, step, rounds in (
        ("forward", _forward, size["rounds"]),
        ("forward + backward", _step, size["training_rounds"]),
    ):
        cases: dict[str, Callable[[], object]] = {
            who: partial(step, form, setting.tensors) for who, form in forms.items()
        }
        taken = interleave(cases, rounds, tick, f"{case}, {metric}")
        for who, seconds in taken.items():
            result.figures.append(Figure(case, who, metric, "ms", [x * 1e3 for x in seconds]))
        for peer in (DENSE, FUSED):
            if peer in taken:
                result.figures.append(ratio(case, metric, (OURS, taken[OURS]), (peer, taken[peer]), None))


def _forward(attend: Attend, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*tensors)


def _step(attend: Attend, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    attend(*tensors).sum().backward()
