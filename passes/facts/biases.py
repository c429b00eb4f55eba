"""What an additive bias on the scores is: ALiBi, a learned table of relative positions, static, or made from data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag
from typing import Any, Literal

import torch
from torch import fx

from attnrewrite.passes.attention.form import NEGLIGIBLE, Attention, Term
from attnrewrite.passes.facts.provenance import Provenance
from attnrewrite.passes.graph.axes import arrange, hint, prod_of
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.evaluate import DependsOnData, Evaluator
from attnrewrite.passes.graph.nodes import WEIGHT, op, tensor

Kind = Literal["alibi", "relative", "static", "data"]

MAX_ELEMENTS = 1 << 22
"""Grids above this are not evaluated: a report must stay cheap."""

_GATHERS = {"embedding", "index", "index_select", "gather", "take", "take_along_dim"}
_RANDOM = {"rand", "randn", "randint", "randperm", "bernoulli", "dropout", "normal", "uniform", "multinomial"}


class Needs(Flag):
    """What a value is computed from."""

    NOTHING = 0
    DATA = 1
    PARAMETER = 2
    GATHER = 4


@dataclass(eq=False, repr=False)
class BiasReader:
    """Classifies the biases of one captured graph; layers share what they have in common."""

    provenance: Provenance
    _evaluator: Evaluator = field(init=False)
    _needs: dict[fx.Node, Needs] = field(default_factory=dict)
    _alibi: dict[fx.Node, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._evaluator = Evaluator(self.provenance.capture)

    def read(self, site: Attention, term: Term) -> tuple[Kind | None, bool | None]:
        """Return the bias's kind, and whether it depends on parameters. A grid too large to look at has no kind."""
        needs = self.needs(term.node)
        trainable = Needs.PARAMETER in needs
        if Needs.DATA in needs:
            return "data", trainable
        if trainable:
            return ("relative" if Needs.GATHER in needs else "static"), True
        value = tensor(term.node)
        if value is None or prod_of(hint(n) for n in value.shape) > MAX_ELEMENTS:
            return None, False
        if term.node not in self._alibi:
            self._alibi[term.node] = self._is_alibi(site, term)
        return ("alibi" if self._alibi[term.node] else "static"), False

    def needs(self, node: fx.Node) -> Needs:
        """Return what ``node`` is computed from."""
        if not self._needs:
            for module in self.provenance.capture.graphs():
                self._scan(module.graph)
        return self._needs.get(node, Needs.DATA)

    def _scan(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node not in self._needs:
                self._needs[node] = self._own(node)

    def _own(self, node: fx.Node) -> Needs:
        capture: Capture = self.provenance.capture
        if node.op == "placeholder" and node not in capture.bindings:
            if node in capture.buffers:
                return Needs.NOTHING
            return Needs.PARAMETER if WEIGHT in node.meta and not node.name.startswith("b_") else Needs.DATA
        if op(node).startswith("sym_") or (op(node) in _RANDOM):
            return Needs.DATA if op(node) in _RANDOM else Needs.NOTHING
        if (body := self.provenance.body(node)) is not None:
            self._scan(body.graph)
        inputs = self.provenance.inputs(node)
        found = Needs.NOTHING
        for source in inputs:
            found |= self._needs.get(source, Needs.DATA)
        if op(node) in _GATHERS and inputs and Needs.PARAMETER in self._needs.get(inputs[0], Needs.NOTHING):
            found |= Needs.GATHER
        return found

    def _is_alibi(self, site: Attention, term: Term) -> bool:
        try:
            value = self._evaluator.value(term.node)
        except DependsOnData:
            return False
        grid = arrange(value, term.layout, site.mask_layout(term.layout), lambda s: hint(s.size))
        return is_alibi(grid, hint(site.sizes()["L"]))


def is_alibi(grid: torch.Tensor, length: int) -> bool:
    """Whether ``grid`` [B|1, H|1, L|1, S|1] is linear in the key's distance, with one slope per head, not all 0.

    What a row has in common cancels in the softmax, so only steps from key to key count. Distances may have a sign or
    not (``|j - i|``); what is filled out, as in a mask joined with the bias, does not count.
    """
    grid = grid.detach().double()
    if grid.dim() != 4 or grid.shape[-1] < 3:
        return False
    seen = grid > NEGLIGIBLE
    steps, valid = grid.diff(dim=-1), seen[..., 1:] & seen[..., :-1]
    offset = grid.shape[-1] - length
    i, j = torch.arange(grid.shape[-2])[:, None] + offset, torch.arange(grid.shape[-1] - 1)[None, :]
    sides: list[Any] = [torch.ones_like(i - j), torch.where(j >= i, -1, 1)]
    return any(_one_slope(steps * side.to(steps.device), valid) for side in sides[: 1 if grid.shape[-2] == 1 else 2])


def _one_slope(steps: torch.Tensor, valid: torch.Tensor) -> bool:
    """Whether all valid ``steps`` of a head are equal, for every head, and heads have slopes at all."""
    low = torch.where(valid, steps, torch.inf).amin((-1, -2))
    high = torch.where(valid, steps, -torch.inf).amax((-1, -2))
    if not bool(valid.any(-1).any(-1).all()):
        return False
    scale = torch.maximum(low.abs(), high.abs())
    return bool((high - low <= 1e-3 * scale).all()) and bool((scale > 0).any())
