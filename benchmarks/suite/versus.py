"""Eager attention through this backend, against inductor alone, eager mode, and fused attention by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from suite.figures import Figure, Goal, Result, ratio
from suite.llama import flops, outputs, train
from suite.measure import Tick, interleave

if TYPE_CHECKING:
    from suite.registry import Size

OURS, PEER, HAND, PLAIN = "attnrewrite", "inductor", "sdpa by hand + inductor", "eager"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
NOTE = (
    "The floor is the work that cannot be left out (linear layers; attention over visible pairs only; the "
    "backward pass twice that) at the rate of the fastest square matmul among the rounds. Softmax, memory "
    "and everything else are not in it. A ratio is taken round by round. No result is written unless "
    "every provider's output and gradients agree with eager mode's and every attention layer was "
    "rewritten."
)


def compare(
    build: Callable[[str], torch.nn.Module], x: torch.Tensor, size: Size, layers: int, goal: Goal, tick: Tick
) -> Result:
    """Time ``build("eager")`` without and with a backward pass; ``build("sdpa")`` is fused by hand."""
    device, dtype = torch.device(size["device"]), getattr(torch, size["dtype"])
    torch._dynamo.reset()
    models = {name: build(name).eval().to(device, dtype) for name in ("eager", "sdpa")}
    x = x.to(device, dtype if x.is_floating_point() else None)
    reports: list[Any] = []
    ours: dict[str, Any] = {"strict": True, "report": reports.append}
    runs = {
        PLAIN: (models["eager"], models["eager"]),
        PEER: (models["eager"], torch.compile(models["eager"], backend="inductor")),
        HAND: (models["sdpa"], torch.compile(models["sdpa"], backend="inductor")),
        OURS: (models["eager"], torch.compile(models["eager"], backend="attnrewrite", options=ours)),
    }
    result, work = Result(), flops(models["eager"], size, layers)
    case = f"N = {size['length']}, {layers} layer{'s' * (layers > 1)}, {size['dtype']}"
    for metric, rounds, factor in (
        ("forward", size["rounds"], 1),
        ("forward + backward", size["training_rounds"], 3),
    ):
        cases: dict[str, Callable[[], object]] = {
            name: partial(_forward if factor == 1 else _step, model, compiled, x)
            for name, (model, compiled) in runs.items()
        }
        cases["matmul"], product = _matmul(size, device, dtype)
        for step, name in enumerate(runs):
            tick(f"compiling: {name}, {metric}", step, len(runs))
            cases[name]()
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        taken = interleave(cases, rounds, tick, f"{case}: {metric}", wait)
        rate = product / min(taken.pop("matmul"))
        floor = factor * sum(work.values()) / rate
        result.facts[f"matmul GFLOP/s beside {metric}"] = round(rate / 1e9, 1)
        result.figures += [Figure(case, name, metric, "s", taken[name], floor) for name in taken]
        held = goal if metric == "forward" else None
        for peer in (PEER, PLAIN, HAND):
            result.figures.append(
                ratio(case, metric, (peer, taken[peer]), (OURS, taken[OURS]), held if peer == PEER else None)
            )
    result.facts["GFLOP, linear layers"] = round(work["linear"] / 1e9, 3)
    result.facts["GFLOP, visible part of the attention"] = round(work["attention"] / 1e9, 3)
    result.facts["largest difference from eager"] = _agree(runs, x, _TOLERANCE[dtype])
    _all_rewritten(reports, layers)
    result.notes.append(NOTE)
    return result


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


def _agree(runs: dict[str, tuple[torch.nn.Module, Any]], x: torch.Tensor, tolerance: float) -> float:
    """Compare outputs and gradients with eager mode's, relative to the largest value."""
    wanted = outputs(*runs[PLAIN], x)
    worst = 0.0
    for name, run in runs.items():
        difference = float((outputs(*run, x) - wanted).abs().max() / wanted.abs().max())
        if difference > tolerance:
            raise RuntimeError(
                f"{name} differs from eager mode by {difference:.3g}; {tolerance:g} is allowed"
            )
        worst = max(worst, difference)
    return float(f"{worst:.2g}")


def _all_rewritten(reports: list[Any], layers: int) -> None:
    for report in reports:
        done = [site.layer for site in report.sites if site.status == "rewritten"]
        if len(done) != layers:
            raise RuntimeError(f"{len(done)} of {layers} attention layers were rewritten")
    if not reports:
        raise RuntimeError("the backend reported nothing")
