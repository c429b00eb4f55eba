"""Recognition side by side with inductor's attention patterns: how much both find, and how long it takes."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnrewrite.bench.clock import interleave
from suite.figures import Figure, Goal, Result
from suite.fresh import python
from suite.llama import Logits, token_ids
from suite.matchers import Seen, counts_per_attention, look

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size

OURS, THEIRS = "attnrewrite", "inductor patterns"
MODES = {"inference": False, "training": True}
NOTE = (
    "Both look at the same Dynamo graph, in one process. Found, ours: attentions recognised and proved. Found, "
    "inductor: torch's own counter `fuse_attention` after its passes over the joint graph, with code generation "
    "replaced by the graph itself, divided by the times that it counts one plain attention in the same mode. That an "
    "attention is found says nothing about what its replacement gains. A grid cell is one model with one attention, "
    "written in one combination of layout, scale, mask, softmax, grouping and further uses of its values "
    "(`tests/grid.py`); the families are those of `tests/families.py` with eager attention. Training is train mode "
    "with gradients and dropout rates of 0. "
    "The time of recognition, ours: match + prove of one model, every proof made anew; beside it the re-trace into the "
    "vocabulary that it reads. inductor: the pass over its joint graph that holds the attention patterns, with "
    "replacement and the other patterns of that pass. "
    "Registration is in fresh processes that have imported inductor; inductor: `joint_graph.lazy_init`, once per "
    "process and device; ours: the import of the passes. "
    "Growth: match + prove of exported Llamas with eager attention, one thread, every proof made anew."
)
_PREPARE = (
    "import sys, time, torch, torch._dynamo, torch._inductor.compile_fx, torch._inductor.fx_passes.joint_graph as j;"
    "sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]; import attnrewrite; t = time.perf_counter();"
)
_REGISTRATION = {
    OURS: "import attnrewrite.passes.pipeline as p; p.RULES['sdpa']",
    THEIRS: "j.lazy_init(torch.device('cpu'))",
}


@dataclass
class Tally:
    """Sums over the models of one case."""

    tried: int = 0
    ours: int = 0
    theirs: int = 0
    seen: list[Seen] = field(default_factory=list)

    def add(self, tried: int, seen: Seen, per_attention: int) -> None:
        """Count one model."""
        self.tried, self.ours = self.tried + tried, self.ours + seen.ours
        self.theirs += seen.theirs // per_attention
        self.seen.append(seen)

    def figures(self, case: str) -> list[Figure]:
        """Return what was found of what was tried, and the times per model."""
        found, ms = f"found of {self.tried}", "ms"
        return [
            Figure(case, OURS, found, "1", [self.ours], goal=Goal(">=", self.tried)),
            Figure(case, THEIRS, found, "1", [self.theirs]),
            Figure(case, OURS, "recognition", ms, [1e3 * s.recognition for s in self.seen]),
            Figure(case, OURS, "re-trace", ms, [1e3 * s.retrace for s in self.seen]),
            Figure(case, THEIRS, "pass with the patterns", ms, [1e3 * s.patterns for s in self.seen]),
        ]


def run(size: Size, tick: Tick) -> Result:
    sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
    result = Result(notes=[NOTE])
    per_attention = {mode: counts_per_attention(training) for mode, training in MODES.items()}
    result.facts["counts of inductor per attention"] = per_attention
    result.figures += _grid(size, per_attention, tick)
    result.figures += _families(size, per_attention, tick)
    result.figures += _registration(size["fresh"], tick)
    result.figures += _growth(size, tick)
    return result


def _grid(size: Size, per_attention: dict[str, int], tick: Tick) -> list[Figure]:
    from grid import DIM, HEADS, LAYOUTS, SCALES, Composed, cells

    rows = [
        cells(layout, scale)
        for m, layout in enumerate(LAYOUTS)
        for n, scale in enumerate(SCALES)
        if (5 * m + 2 * n) % size["spread"] == 0
    ]
    todo = [cell for row in rows for cell in row][: size["cells"]]
    tallies = {mode: Tally() for mode in MODES}
    for done, cell in enumerate(todo):
        tick("grid", done, len(todo))
        for mode, training in MODES.items():
            torch.manual_seed(0)
            pad = torch.ones(2, 9, dtype=torch.bool)
            inputs = {"x": torch.randn(2, 9, HEADS * DIM), "pad": pad}
            tallies[mode].add(1, look(Composed([cell]), inputs, training), per_attention[mode])
    return [figure for mode, tally in tallies.items() for figure in tally.figures(f"spelling grid, {mode}")]


def _families(size: Size, per_attention: dict[str, int], tick: Tick) -> list[Figure]:
    from families import FAMILIES, build

    todo = FAMILIES[: size["families"]]
    tallies = {mode: Tally() for mode in MODES}
    for done, family in enumerate(todo):
        tick(family.name, done, len(todo))
        for mode, training in MODES.items():
            seen = look(build(family, "eager"), family.inputs(), training)
            tallies[mode].add(len(family.layers), seen, per_attention[mode])
    return [figure for mode, tally in tallies.items() for figure in tally.figures(f"model families, {mode}")]


def _registration(rounds: int, tick: Tick) -> list[Figure]:
    """Time both in fresh processes; a first one of each writes the bytecode and is left out."""
    taken: dict[str, list[float]] = {name: [] for name in _REGISTRATION}
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(rounds + 1):
            for name, code in _REGISTRATION.items():
                tick(f"registration: {name}", turn, rounds + 1)
                said = python("-c", f"{_PREPARE} {code}; print('took', time.perf_counter() - t)", bytecode)
                taken[name] += [1e3 * float(said.split()[-1])] if turn else []
    goals = {OURS: Goal("<=", 50.0)}
    return [Figure("once per process", x, "registration", "ms", taken[x], goal=goals.get(x)) for x in taken]


def _growth(size: Size, tick: Tick) -> list[Figure]:
    from attnrewrite.explanation import capture_model

    captures: dict[int, Any] = {}
    for step, layers in enumerate(size["depths"]):
        tick(f"exporting {layers} layers", step, len(size["depths"]))
        model = Logits(size, "eager", layers).eval()
        captures[layers] = capture_model(model, (token_ids(size),), {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases: dict[str, Any] = {str(n): lambda c=c: _recognise(c) for n, c in captures.items()}
        taken = interleave(cases, size["rounds"], tick, "match + prove")
    finally:
        torch.set_num_threads(threads)
    return _growth_figures({n: taken[str(n)] for n in captures})


def _recognise(capture: Any) -> None:
    from attnrewrite.passes.pipeline import Pipeline

    Pipeline().inspect(capture)


def _growth_figures(taken: dict[int, list[float]]) -> list[Figure]:
    """Return the time of every depth, the slope, and the time per layer of the deepest over the shallowest."""
    few, many = min(taken), max(taken)
    goals = {32: Goal("<=", 1000.0)}
    whole = [
        Figure(f"Llama, {n} layers", OURS, "recognition", "ms", [1e3 * t for t in times], goal=goals.get(n))
        for n, times in taken.items()
    ]
    pairs = list(zip(taken[few], taken[many], strict=True))
    case = f"Llama, {few} to {many} layers"
    slope = Figure(case, OURS, "slope of recognition", "ms/layer", [1e3 * (b - a) / (many - few) for a, b in pairs])
    ratio = [(b / many) / (a / few) for a, b in pairs]
    return [
        *whole,
        slope,
        Figure(case, OURS, "time per layer, deepest over shallowest", "x", ratio, goal=Goal("<=", 1.2)),
    ]
