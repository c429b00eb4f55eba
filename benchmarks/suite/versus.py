"""Eager attention through this backend, against inductor alone, eager mode, and fused attention by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo.utils

from attnrewrite.bench.clock import Tick, interleave, waiting, wall
from suite.figures import Figure, Goal, Result, ratio
from suite.llama import flops, outputs, train

if TYPE_CHECKING:
    from suite.registry import Size

OURS, PEER, HAND, PLAIN = "attnrewrite", "inductor", "sdpa by hand + inductor", "eager"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
NOTE = (
    "Every thread count is held to the goal: on a busy machine each parallel region waits for a thread that "
    "is not running, which costs whoever has more regions, whatever the work. "
    "The floor is the work that cannot be left out (linear layers; attention over visible pairs only; the "
    "backward pass twice that) at the rate of the fastest square matmul among the rounds. Softmax, memory "
    "and everything else are not in it. A ratio is taken round by round. No result is written unless "
    "every provider's output and gradients agree with eager mode's, every attention layer was rewritten, "
    "and nothing was compiled while the clock ran."
)
Runs = dict[str, tuple[torch.nn.Module, Any]]
"""The module and what is called, by provider."""


def compare(
    build: Callable[[str], torch.nn.Module], x: torch.Tensor, size: Size, layers: int, goal: Goal, tick: Tick
) -> Result:
    """Time ``build("eager")`` without and with a backward pass; ``build("sdpa")`` is fused by hand."""
    device, dtype = torch.device(size["device"]), getattr(torch, size["dtype"])
    models = {name: build(name).eval().to(device, dtype) for name in ("eager", "sdpa")}
    x = x.to(device, dtype if x.is_floating_point() else None)
    result, work = Result(notes=[NOTE]), flops(models["eager"], size, layers)
    result.facts = {f"GFLOP, {name}": round(n / 1e9, 3) for name, n in work.items()}
    before = torch.get_num_threads()
    for threads in size["threads"]:
        torch._dynamo.reset()
        torch.set_num_threads(threads or before)
        try:
            _compare(models, x, size, layers, goal, tick, result, sum(work.values()))
        finally:
            torch.set_num_threads(before)
    return result


def _compare(
    models: dict[str, torch.nn.Module],
    x: torch.Tensor,
    size: Size,
    layers: int,
    goal: Goal,
    tick: Tick,
    result: Result,
    work: float,
) -> None:
    """Time every provider at the present number of threads."""
    reports: list[Any] = []
    ours: dict[str, Any] = {"strict": True, "report": reports.append}
    runs: Runs = {
        PLAIN: (models["eager"], models["eager"]),
        PEER: (models["eager"], torch.compile(models["eager"], backend="inductor")),
        HAND: (models["sdpa"], torch.compile(models["sdpa"], backend="inductor")),
        OURS: (models["eager"], torch.compile(models["eager"], backend="attnrewrite", options=ours)),
    }
    place = f"{torch.get_num_threads()} thread(s)" if x.device.type == "cpu" else "cuda"
    case = f"N = {size['length']}, {layers} layer(s), {size['dtype']}, {place}"
    clock = waiting if x.device.type == "cuda" else wall
    steps = (
        ("forward", _forward, size["rounds"], 1),
        ("forward + backward", _step, size["training_rounds"], 3),
    )
    for metric, step, rounds, factor in steps:
        cases: dict[str, Callable[[], object]] = {
            name: partial(step, model, compiled, x) for name, (model, compiled) in runs.items()
        }
        cases["matmul"], product = _matmul(size, x.device, getattr(torch, size["dtype"]))
        for done, name in enumerate(runs):
            tick(f"compiling: {name}, {metric}, {place}", done, len(runs))
            cases[name]()
        graphs, start, used = _graphs(), time.perf_counter(), time.process_time()
        taken = interleave(cases, rounds, tick, f"{metric}, {place}", clock)
        got = (time.process_time() - used) / (time.perf_counter() - start)
        if _graphs() != graphs:
            raise RuntimeError(f"something was compiled while the clock ran: {metric}, {place}")
        rate = product / min(taken.pop("matmul"))
        result.facts[f"{metric}, {place}"] = f"{rate / 1e9:.1f} GFLOP/s in matmul, {got:.2f} CPU seconds per second"
        floor = factor * work / rate
        result.figures += [Figure(case, name, metric, "s", taken[name], floor) for name in taken]
        for peer in (PEER, PLAIN, HAND):
            held = goal if (peer, metric) == (PEER, "forward") else None
            pair = (peer, taken[peer]), (OURS, taken[OURS])
            result.figures.append(ratio(case, metric, *pair, held))
    difference = _agree(runs, x, _TOLERANCE[getattr(torch, size["dtype"])])
    result.facts[f"largest difference from eager, {place}"] = difference
    _all_rewritten(reports, layers)


def _graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def _forward(model: torch.nn.Module, compiled: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        compiled(x)


def _step(model: torch.nn.Module, compiled: Any, x: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    train(compiled(x))


def _matmul(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """Return a square matmul of the model's longest side, and its FLOPs."""
    n = max(size["length"], size["hidden"])
    a = torch.randn(n, n, device=device, dtype=dtype)
    return lambda: a @ a, 2.0 * n**3


def _agree(runs: Runs, x: torch.Tensor, tolerance: float) -> float:
    """Compare outputs and gradients with eager mode's, relative to the largest value."""
    wanted = outputs(*runs[PLAIN], x)
    worst = 0.0
    for name, run in runs.items():
        difference = float((outputs(*run, x) - wanted).abs().max() / wanted.abs().max())
        if difference > tolerance:
            raise RuntimeError(f"{name} differs from eager mode by {difference:.3g}; {tolerance:g} is allowed")
        worst = max(worst, difference)
    return float(f"{worst:.2g}")


def _all_rewritten(reports: list[Any], layers: int) -> None:
    for report in reports:
        done = [site.layer for site in report.sites if site.status == "rewritten"]
        if len(done) != layers:
            raise RuntimeError(f"{len(done)} of {layers} attention layers were rewritten")
    if not reports:
        raise RuntimeError("the backend reported nothing")
