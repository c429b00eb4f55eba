"""Affine normal form of attention scores: the steps from the product to the softmax, folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from attnrewrite.passes.attention.form import Reject, Scores, Term
from attnrewrite.passes.graph.axes import Layout


@dataclass(eq=False, repr=False)
class Step:
    """One thing done to the scores."""

    kind: Literal["scale", "factor", "tanh", "term", "floor"]
    number: float = 1.0
    node: fx.Node | None = None
    layout: Layout = ()
    divide: bool = False
    term: Term | None = None


def normal_form(contraction: fx.Node, steps: Sequence[Step], start: fx.Node) -> Scores:
    """Fold ``steps``, given in the order from the softmax inwards. Raises Reject where their order does not fit."""
    scores = Scores(contraction)
    for step in reversed(steps):
        _FOLD[step.kind](scores, step, start)
    return scores


def _scale(scores: Scores, step: Step, start: fx.Node) -> None:
    """Scale everything found so far. Of a soft-capped product only the cap grows: n · c·tanh(x / c)."""
    if scores.softcap is None:
        scores.alpha *= step.number
    else:
        if step.number <= 0:
            raise Reject("AR203", "soft-capped scores are scaled by a number that is not positive", start)
        scores.alpha *= step.number
        scores.softcap *= step.number
    if (scores.terms or scores.floor is not None) and step.number <= 0:
        raise Reject("AR203", "masked scores are scaled by a number that is not positive", start)
    for term in scores.terms:
        term.weight *= step.number
        term.value *= step.number
    if scores.floor is not None:
        scores.floor *= step.number


def _factor(scores: Scores, step: Step, start: fx.Node) -> None:
    if scores.softcap is not None or scores.terms or scores.floor is not None:
        raise Reject("AR203", "scores are scaled by a tensor after soft-cap, bias or mask", start)
    assert step.node is not None
    scores.factors.append((step.node, step.layout, step.divide))


def _tanh(scores: Scores, step: Step, start: fx.Node) -> None:
    if scores.softcap is not None or scores.terms or scores.floor is not None:
        raise Reject("AR203", "tanh is applied after a bias or a second time", start)
    scores.softcap = 1.0


def _term(scores: Scores, step: Step, start: fx.Node) -> None:
    if scores.floor is not None:
        raise Reject("AR203", "scores are masked again after a floor", start)
    assert step.term is not None
    scores.terms.append(step.term)


def _floor(scores: Scores, step: Step, start: fx.Node) -> None:
    scores.floor = step.number if scores.floor is None else max(scores.floor, step.number)


_FOLD = {"scale": _scale, "factor": _factor, "tanh": _tanh, "term": _term, "floor": _floor}
