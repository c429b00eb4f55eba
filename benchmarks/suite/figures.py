"""A figure: one measured number with its spread, the physical floor below it and the goal it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from attnrewrite.bench.clock import rounded
from attnrewrite.kernels.tuning.quantile import quantile


@dataclass(frozen=True)
class Goal:
    """What a figure's median should be."""

    sense: Literal["<=", ">="]
    value: float

    def met(self, value: float) -> bool:
        """Whether ``value`` reaches the goal."""
        return value <= self.value if self.sense == "<=" else value >= self.value


@dataclass(frozen=True)
class Figure:
    """Samples of one quantity.

    case: what was run, with its size.
    provider: who ran it; for a ratio, "peer / ours".
    metric: what was taken: "forward", "share of the compile time", ...
    unit: "s", "ms", "x" (a ratio), "%", ...
    floor: the least that the quantity can be on this machine, in the same unit; None where nothing bounds it.
    """

    case: str
    provider: str
    metric: str
    unit: str
    samples: Sequence[float]
    floor: float | None = None
    goal: Goal | None = None

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return quantile(self.samples, 0.5)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        return self.goal.met(self.median) if self.goal else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "case": self.case,
            "provider": self.provider,
            "metric": self.metric,
            "unit": self.unit,
            "p20": rounded(quantile(self.samples, 0.2)),
            "p50": rounded(self.median),
            "p80": rounded(quantile(self.samples, 0.8)),
            "samples": [rounded(x) for x in self.samples],
            "floor": None if self.floor is None else rounded(self.floor),
            "over_floor": rounded(self.median / self.floor) if self.floor else None,
            "goal": asdict(self.goal) if self.goal else None,
            "met": self.met,
        }


@dataclass
class Result:
    """What an entry found: figures, floors as they were measured, and what a reader has to know.

    A fact that is a list of records is shown as a table.
    """

    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    drawing: str = ""
    """SVG, if there is one."""


def ratio(
    case: str,
    metric: str,
    above: tuple[str, Sequence[float]],
    below: tuple[str, Sequence[float]],
    goal: Goal | None,
) -> Figure:
    """Divide two interleaved series round by round: what slows both down for a while cancels."""
    (peer, over), (ours, under) = above, below
    samples = [a / b for a, b in zip(over, under, strict=True)]
    return Figure(case, f"{peer} / {ours}", metric, "x", samples, goal=goal)
