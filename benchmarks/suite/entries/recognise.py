"""The time of recognition for Llamas of several depths, each exported once."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import fx

from attnrewrite.bench.clock import interleave
from attnrewrite.kernels.tuning.quantile import quantile
from suite.figures import Figure, Result
from suite.llama import Logits, token_ids

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size
NOTE = (
    "The floor is one walk over the graph that reads every node's arguments. The slope is the difference "
    "between the shallowest and the deepest model of the first length, per layer; an exponent of 1 means "
    "that twice the layers take twice the time. The mask is evaluated on its whole N x N grid, once per "
    "graph."
)


def run(size: Size, tick: Tick) -> Result:
    from attnrewrite.explanation import capture_model
    from attnrewrite.passes.matching.match import match

    captures: dict[str, Any] = {}
    for step, (layers, length) in enumerate(size["shapes"]):
        tick(f"exporting {layers} layers", step, len(size["shapes"]))
        model = Logits(size, "eager", layers).eval()
        capture = capture_model(model, (token_ids({**size, "length": length}),), {})
        captures[f"{layers} layer{'s' * (layers > 1)}, N = {length}"] = capture
        if len(match(capture).attentions) != layers:
            raise RuntimeError(f"not all of {layers} attention layers are recognised")
    cases: dict[str, Any] = {name: partial(match, capture) for name, capture in captures.items()}
    cases |= {f"walk {name}": partial(_walk, capture.module.graph) for name, capture in captures.items()}
    taken = interleave(cases, size["rounds"], tick, "match")
    result = Result()
    for name in captures:
        floor = quantile(taken[f"walk {name}"], 0.5) * 1e3
        samples = [x * 1e3 for x in taken[name]]
        result.figures.append(Figure(name, "attnrewrite", "match", "ms", samples, floor))
    result.figures += _growth(size["shapes"], [taken[name] for name in captures])
    result.facts["nodes"] = {name: len(capture.module.graph.nodes) for name, capture in captures.items()}
    result.notes.append(NOTE)
    return result


def _walk(graph: fx.Graph) -> int:
    return sum(len(node.all_input_nodes) for node in graph.nodes)


def _growth(shapes: list[tuple[int, int]], taken: list[list[float]]) -> list[Figure]:
    """Return slope and exponent between the shallowest and the deepest model of one length."""
    same = [(layers, t) for (layers, n), t in zip(shapes, taken, strict=True) if n == shapes[0][1]]
    (few, short), (many, long) = min(same), max(same)
    case = f"{few} to {many} layers, N = {shapes[0][1]}"
    slope = [(b - a) * 1e3 / (many - few) for a, b in zip(short, long, strict=True)]
    power = [math.log(b / a) / math.log(many / few) for a, b in zip(short, long, strict=True)]
    return [
        Figure(case, "attnrewrite", "slope of match", "ms/layer", slope),
        Figure(case, "attnrewrite", "exponent of match", "1", power),
    ]
