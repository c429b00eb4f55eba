"""The table of goals in docs/kernels.md: ``python benchmarks/predict.py docs/kernels.md`` writes it anew.

Kernels are compiled for an H200, which need not be there, and the cost model says how long they would take. Triton must
not interpret.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import click  # noqa: E402  # the suite is found through the path above
from suite.goals import GOALS, MEMORY  # noqa: E402
from suite.model import Model  # noqa: E402
from suite.usage import usage  # noqa: E402

from attnrewrite.kernels.tuning.device import H200  # noqa: E402
from attnrewrite.kernels.tuning.published import RATES  # noqa: E402

BEGIN, END = "<!-- Made by `make predictions`: begin -->", "<!-- Made by `make predictions`: end -->"
STORE = HERE / "results" / "predictions.json"
HEAD = (
    "| inputs | pass | ratio of times | must | target | predicted | floor |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: |",
)


def rows(model: Model) -> Iterator[dict[str, object]]:
    """Yield every goal with what the model expects."""
    with click.progressbar(GOALS, label="compiling", file=sys.stderr) as shown:
        for aim in shown:
            expected, least = (round(x, 2) for x in (model.ratio(aim), model.floor(aim)))
            where = {"case": aim.case.name, "metric": aim.metric, "what": aim.text}
            yield {**where, "must": aim.must, "target": aim.target, "predicted": expected, "floor": least}


def line(row: dict[str, object]) -> str:
    """Return a line of the table."""
    cells = [f"{x:g}" if isinstance(x, float) else str(x) for x in row.values()]
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.argument("page", type=click.Path(path_type=Path, exists=True))
def main(page: Path) -> None:
    """Predict, put the table into PAGE, and keep it for the profile of a GPU."""
    found = list(rows(Model(H200, RATES[H200.name], usage)))
    STORE.write_text(json.dumps({"device": H200.name, "goals": found}, indent=1) + "\n", encoding="utf-8")
    sizes = {aim.case.name: aim.case for aim in GOALS if aim.case != MEMORY}
    inputs = "; ".join(f"{name} = ({x.B}, {x.H}, {x.N}, {x.D})" for name, x in sizes.items())
    lines = [f"[B, H, N, D]: {inputs}.", "", *HEAD, *map(line, found)]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
