"""Find a skeleton in a graph: subgraph monomorphism around every node that may be the skeleton's last step.

Only the ancestors of such a node that can take part are searched, so that the time grows with the number of places and
not with the size of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from networkx import DiGraph  # type: ignore[import-untyped]  # it ships none
from networkx.algorithms.isomorphism import DiGraphMatcher  # type: ignore[import-untyped]  # likewise
from torch import fx

from attnrewrite.passes.graph.nodes import is_node, op
from attnrewrite.passes.patterns.skeleton import (
    COMMUTATIVE,
    TENSOR,
    Label,
    Skeleton,
    behind,
    fits,
    label,
    leaf,
    operands,
)

_TRIES = 64
"""Monomorphisms that are tried at one place; more than one is a matter of symmetry."""


@dataclass(eq=False, repr=False)
class Host:
    """A graph that is searched; labels are computed once, and so are ``traces`` of patterns at its sizes."""

    graph: fx.Graph
    counts: Counter[str] = field(default_factory=Counter)
    memo: dict[fx.Node, Label] = field(default_factory=dict)
    traces: dict[Any, Skeleton | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts.update(self.label(node).name for node in self.graph.nodes if op(node))

    def label(self, node: fx.Node) -> Label:
        """Return what a node does."""
        if node not in self.memo:
            self.memo[node] = label(node)
        return self.memo[node]


def matches(host: Host, skeleton: Skeleton, labels: Sequence[Label]) -> Iterator[Iterator[list[fx.Node]]]:
    """Yield for every possible place the ways in which the skeleton lies there: the graph's node of every step."""
    wanted = Counter(x.name for x in labels)
    if wanted - host.counts:
        return
    pattern, depth = _pattern(skeleton, labels)
    for root in list(host.graph.nodes):
        if fits(labels[-1], host.label(root)):
            near = _around(host, root, depth, set(wanted))
            if not wanted - Counter(host.label(node).name for node in near):
                yield _ways(near, pattern, len(labels))


def _ways(near: DiGraph, pattern: DiGraph, count: int) -> Iterator[list[fx.Node]]:
    def node_match(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
        return found["root"] == wanted["root"] and fits(wanted["label"], found["label"])

    def edge_match(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
        return bool(found["at"] == wanted["at"])

    matcher = DiGraphMatcher(near, pattern, node_match=node_match, edge_match=edge_match)
    for mapping in islice(matcher.subgraph_monomorphisms_iter(), _TRIES):
        back = {n: node for node, n in mapping.items()}
        yield [back[n] for n in range(count)]


def _pattern(skeleton: Skeleton, labels: Sequence[Label]) -> tuple[DiGraph, int]:
    """Return the skeleton's steps, by number, as a graph, and the length of its longest path."""
    number = {step: n for n, step in enumerate(skeleton.steps)}
    out, depth = DiGraph(), dict[int, int]()
    for step, n in number.items():
        out.add_node(n, label=labels[n], root=n == len(labels) - 1)
        depth[n] = 0
        for source, at in _sources(step).items():
            if source in number:
                out.add_edge(number[source], n, at=at)
                depth[n] = max(depth[n], depth[number[source]] + 1)
    return out, max(depth.values())


def _around(host: Host, root: fx.Node, depth: int, names: set[str]) -> DiGraph:
    """Return the part of the graph that ends in ``root`` and may be the skeleton."""
    out = DiGraph()
    out.add_node(root, label=host.label(root), root=True)
    front = [root]
    for _ in range(depth):
        following = list[fx.Node]()
        for node in front:
            for source, at in _sources(node).items():
                if op(source) and host.label(source).name in names:
                    if source not in out:
                        out.add_node(source, label=host.label(source), root=False)
                        following.append(source)
                    out.add_edge(source, node, at=at)
        front = following
    return out


def _sources(node: fx.Node) -> dict[fx.Node, tuple[int, ...]]:
    """Return the tensors that a node reads with the positions at which it does; -1 where the order is free."""
    found: dict[fx.Node, tuple[int, ...]] = {}
    free = op(node) in COMMUTATIVE
    for n, value in enumerate(operands(node)):
        if is_node(value) and leaf(value) is TENSOR:
            source = behind(value)
            found[source] = (*found.get(source, ()), -1 if free and n < 2 else n)
    return found


def aligned(step: fx.Node, node: fx.Node, place: dict[fx.Node, fx.Node]) -> list[tuple[Any, Any]]:
    """Pair the operands of a skeleton's step with those of its node, in the node's order.

    ``place`` maps the skeleton's steps to their nodes.
    """
    ours, theirs = operands(step), operands(node)
    if op(step) in COMMUTATIVE and all(is_node(x) for x in (*ours[:2], *theirs[:2])):
        wanted = [place.get(behind(x)) for x in ours[:2]]
        there = [behind(x) for x in theirs[:2]]
        if any(w is not None and w is not t for w, t in zip(wanted, there, strict=True)):
            ours[:2] = [ours[1], ours[0]]
    return list(zip(ours, theirs, strict=True))
