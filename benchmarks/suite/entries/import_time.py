"""Start-up: the import of the package and the help of the command line, in fresh processes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attnrewrite.bench.clock import interleave
from suite.figures import Figure, Goal, Result
from suite.fresh import python

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size

BARE, IMPORT, HELP, TORCH = "python -c pass", "import attnrewrite", "attnrewrite --help", "import torch"
_CODE = {
    BARE: "pass",
    IMPORT: "import attnrewrite",
    HELP: "from attnrewrite.cli import main; raise SystemExit(main(['--help']))",
    TORCH: "import torch",
}
NOTE = (
    "The floor is the median of the bare interpreter. `attnrewrite --help` is run as the console script "
    "runs it. `import torch` is there for comparison: who imports it reaches neither goal."
)


def run(size: Size, tick: Tick) -> Result:
    cases = {name: partial(python, "-c", code) for name, code in _CODE.items()}
    taken = interleave(cases, size["rounds"], tick, "fresh processes")
    floor = sorted(taken[BARE])[len(taken[BARE]) // 2]
    over = [a - b for a, b in zip(taken[IMPORT], taken[BARE], strict=True)]
    result = Result()
    result.figures = [Figure("whole process", name, "wall time", "s", taken[name], floor) for name in cases]
    result.figures[2] = Figure("whole process", HELP, "wall time", "s", taken[HELP], floor, Goal("<=", 0.5))
    result.figures.append(Figure("over a bare interpreter", IMPORT, "wall time", "s", over, goal=Goal("<=", 0.1)))
    result.notes.append(NOTE)
    return result
