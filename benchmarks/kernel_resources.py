"""The table in docs/kernels.md: ``python benchmarks/kernel_resources.py docs/kernels.md`` writes it anew.

Every kernel is compiled for every target, as it runs where nothing was tuned; no GPU is needed. Triton must not
interpret.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import click  # the suite is found through the path above
from suite.usage import untuned

from attnrewrite.kernels.dense.catalogue import KERNELS, made_apart, users
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.descriptors import LOADED
from attnrewrite.kernels.generation.resources import Resources

BEGIN, END = "<!-- Made by `make resources`: begin -->", "<!-- Made by `make resources`: end -->"
TARGETS = ("sm_80", "sm_90", "sm_100")
WIDTHS = (64, 128, 256)


class Case(NamedTuple):
    """One compilation: bfloat16, causal, heads of ``width`` features, with or without tensor descriptors."""

    name: str
    variant: str
    width: int
    target: str
    descriptors: bool = False


def cases() -> Iterator[Case]:
    """Every kernel for every target, by descriptors for one of them, and the forward pass for an AMD one."""
    for width in WIDTHS:
        for name in KERNELS:
            if name == "live" and width > WIDTHS[0]:
                continue  # has nothing to do with features
            if name == "backward_values" and not made_apart(width, width):
                continue  # backward_keys makes dv as well
            for variant in users(name):
                yield from (Case(name, variant, width, target) for target in TARGETS)
                if name in LOADED:
                    yield Case(name, variant, width, "sm_90", descriptors=True)
        yield Case("forward", "sdpa", width, "gfx942")


def measured(case: Case) -> tuple[Config, Resources]:
    """Compile one case."""
    first = configs(case.name, case.width, 16)[0]._replace(descriptors=case.descriptors)
    return untuned(case.name, case.variant, case.width, case.target, first)


def row(case: Case, config: Config, used: Resources) -> str:
    """Return a line of the table."""
    facts = (used.registers, used.spills, f"{used.shared / 1024:.0f}", used.matrix)
    return "| " + " | ".join(map(str, (case.name, case.variant, case.width, case.target, config, *facts))) + " |"


HEAD = (
    "| kernel | variant | features | target | tile, warps, stages | registers | spills | shared, KiB | products |",
    "| --- | --- | ---: | --- | --- | ---: | ---: | ---: | --- |",
)


@click.command()
@click.argument("page", type=click.Path(path_type=Path, exists=True))
def main(page: Path) -> None:
    """Compile everything, and put the table into PAGE."""
    import triton

    lines = [f"Triton {triton.__version__}, bfloat16, causal.", "", *HEAD]
    with click.progressbar(list(cases()), label="compiling") as shown:
        lines += [row(case, *measured(case)) for case in shown]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
