"""The share of the passes in a cold compile, in fresh processes with empty caches, beside inductor alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from suite.figures import Figure, Goal, Result, ratio
from suite.fresh import python

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size

PASSES = ("match", "prove", "rewrite")
PARTS = ("import of the backend", "re-trace", *PASSES, "inner compiler", "cold compile")
NOTE = (
    "A cold compile is the first call less the second, without gradients, in a fresh process with empty "
    "inductor and triton caches. The share is match + prove + rewrite + re-trace of the same process. The "
    "import of the backend (torch is loaded before) comes once per process and is not in it. With "
    "gradients inductor compiles a backward graph, too, and the share is smaller."
)


def run(size: Size, tick: Tick) -> Result:
    result = Result()
    for depth, rounds in size["depths"].items():
        case = f"{depth} layer{'s' * (depth > 1)}, N = {size['length']}, inner {size['inner']}"
        ours, peer = list[dict[str, float]](), list[dict[str, float]]()
        for done in range(rounds):
            for place, (provider, runs) in enumerate((("attnrewrite", ours), (size["inner"], peer))):
                tick(f"{case}: {provider}", 2 * done + place, 2 * rounds)
                wanted = {**size, "depths": None, "depth": depth, "provider": provider}
                runs.append(json.loads(python("-m", "suite.cold_compile", json.dumps(wanted))))
        result.figures += _figures(case, ours, [x["cold compile"] for x in peer], size["inner"])
    result.notes.append(NOTE)
    return result


def _figures(case: str, ours: list[dict[str, float]], peer: list[float], inner: str) -> list[Figure]:
    figures = [Figure(case, "attnrewrite", part, "s", [x.get(part, 0.0) for x in ours]) for part in PARTS]
    whole = [x["cold compile"] for x in ours]
    figures.append(Figure(case, inner, "cold compile", "s", peer))
    figures.append(ratio(case, "cold compile", (inner, peer), ("attnrewrite", whole), None))
    for metric, steps, goal in (
        ("share of passes and re-trace", (*PASSES, "re-trace"), Goal("<=", 10.0)),
        ("share of the re-trace", ("re-trace",), None),
    ):
        shares = [100 * sum(x.get(s, 0.0) for s in steps) / x["cold compile"] for x in ours]
        figures.append(Figure(case, "attnrewrite", metric, "%", shares, goal=goal))
    return figures
