"""Find attention: from each softmax-like anchor outwards to an Attention, or to a Rejection with a code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from attnrewrite.passes.attention.contract import Contraction, from_result
from attnrewrite.passes.attention.form import Attention, Operand, Reject, Role, Scores, Term
from attnrewrite.passes.attention.operands import nearest, peel
from attnrewrite.passes.attention.regions import check_regions
from attnrewrite.passes.attention.roles import Roles, tell_roles
from attnrewrite.passes.attention.softmax import Softmax, softmax_at
from attnrewrite.passes.graph.axes import AxisError, Dim, Layout, Symbol, broadcast, flat, fresh, symbols
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.flex import is_flex, reason
from attnrewrite.passes.graph.nodes import argument, common_layer, is_node, op, shape, source_line
from attnrewrite.passes.masks.classify import MaskReader
from attnrewrite.passes.matching import scores as score_form
from attnrewrite.passes.matching.joins import Block, both, chosen, key_join, query_and_key, second_keys
from attnrewrite.passes.matching.others import is_attention_like, kind_of, stored_apart
from attnrewrite.passes.matching.probs import Follower, Mixed
from attnrewrite.passes.matching.walk import LOST, NO_PRODUCT, Walk
from attnrewrite.passes.patterns import registry as patterns
from attnrewrite.passes.report import Rejection

FUSED = {"scaled_dot_product_attention"}


@dataclass(eq=False, repr=False)
class Found:
    """Everything the recogniser says about one graph."""

    attentions: list[Attention] = field(default_factory=list)
    refused: list[tuple[fx.Node, Rejection]] = field(default_factory=list)
    not_attention: list[Rejection] = field(default_factory=list)


def anchors(graph: fx.Graph) -> Iterator[tuple[fx.Node, Softmax | None]]:
    """Yield what may be the heart of an attention, in order: softmaxes, and fused operators (with None)."""
    for node in graph.nodes:
        if op(node) in FUSED or is_flex(node):
            yield node, None
        elif (softmax := softmax_at(node)) is not None:
            yield node, softmax


def match(capture: Capture) -> Found:
    """Recognise every attention of every graph of ``capture``."""
    found, reader = Found(), MaskReader(capture)
    for module in capture.graphs():
        missed: list[tuple[fx.Node, Rejection]] = []
        for anchor, softmax in anchors(module.graph):
            try:
                site = _from_fused(anchor, reader) if softmax is None else _from_softmax(softmax, reader)
                found.attentions.append(site)
            except (Reject, AxisError) as error:
                reject = _verdict(error, anchor, softmax)
                place = reject.node if reject.node is not None else anchor
                row = reject.rejection(common_layer([anchor]), source_line(place) or source_line(anchor))
                if reject.code == "AR202" and softmax is not None:
                    row.detail = f"{kind_of(softmax)} ({row.detail})"
                missed.append((anchor, row))
        extra = patterns.search(module.graph, found.attentions, reader)
        found.attentions += extra.attentions
        found.refused += [x for x in missed if x[1].code != "AR202" and x[0] not in extra.nodes] + extra.refused
        found.not_attention += [x[1] for x in missed if x[1].code == "AR202" and x[0] not in extra.nodes]
    return found


def _verdict(failure: Reject | AxisError, anchor: fx.Node, softmax: Softmax | None) -> Reject:
    """Return why an anchor was not matched; attention whose form is not read is refused, not called another thing."""
    if not isinstance(failure, Reject):
        return Reject("AR203", str(failure), anchor)
    lost = failure.detail.startswith(LOST)
    if softmax is None or not (lost or (failure.code == "AR202" and is_attention_like(softmax))):
        return failure
    detail, apart = failure.detail, stored_apart(softmax)
    if apart is not None:
        return Reject("AR203", *apart, "scores of all queries and keys in one matrix: query @ key.mT")
    if detail == NO_PRODUCT and failure.node is not None:
        detail = f"{failure.node.target} stands between the query-key product and the softmax"
    return Reject("AR203", detail, failure.node, failure.nearest)


def _from_softmax(softmax: Softmax, reader: MaskReader) -> Attention:
    anchor = softmax.node
    layout = fresh(anchor, [f"x{n}" for n in range(len(shape(anchor)))])
    scores, walk = score_form.read(softmax, layout)
    if not scores.contraction.meta["val"].dtype.is_floating_point:
        raise Reject("AR203", "the queries and keys are integers or complex numbers", scores.contraction)
    block = Block(scores.contraction, walk.layout, walk.cols) if walk.blocks is None else walk.blocks[0]
    product = from_result(scores.contraction, block.layout, "d")
    query, key = query_and_key(product, block.cols)
    region: dict[tuple[Role, fx.Node], Layout] = dict(walk.region)
    region |= {("probs", step): layout for step in softmax.steps}
    parts = None if walk.blocks is None else (walk.blocks[0].cols, walk.blocks[1].cols)
    mixed = Follower(scores, region, walk.cols, parts).follow(anchor, layout)
    finite = mixed.guard is not None and mixed.guard.value != -math.inf
    if mixed.guard is not None:
        mixed.guard.value = -math.inf  # a filled row gives 0 in the end: what fused operators make of -inf
    ways = _ways(query, key, product, walk, mixed, region, scores)
    chains = {role: found[0] if len(found) == 1 else both(*found) for role, found in ways.items()}
    outer = tuple(s for s in symbols(mixed.layout) if s not in set(symbols(walk.layout)))
    axes = tell_roles(chains, product.summed, outer, walk.cols, walk.layout, mixed.output, mixed.layout)
    query_first = query.layout is product.left_layout
    site = _build(anchor, mixed, ways, scores, axes, region, reader, query_first, softmax, walk.blocks)
    seen = site.visibility
    added = any(term.kind == "add" for term in seen.terms) and not seen.rows_never_empty
    if finite and (added or not seen.bias_is_small):
        # What is added as low as the fill would share its row with keys that are zeroed afterwards.
        raise Reject("AR203", "weights are zeroed after the softmax, beside a finite fill and a bias", anchor)
    return site


def _ways(
    query: Operand,
    key: Operand,
    product: Contraction,
    walk: Walk,
    mixed: Mixed,
    region: dict[tuple[Role, fx.Node], Layout],
    scores: Scores,
) -> dict[Role, list[list[Operand]]]:
    """Return the ways of queries, keys and values towards their projections, by blocks."""
    queries, first = peel("query", query, region, scores), Scores(scores.contraction)
    keys = [peel("key", key, region, first)]
    if walk.blocks is not None:
        left = query.layout is product.left_layout
        keys.append(second_keys(walk.blocks[1], query, product.summed, left, region, first))
    scores.alpha *= first.alpha
    blocks = [mixed.value] if mixed.values is None else mixed.values.operands
    values = [peel("value", block, region, None) for block in blocks]
    if len({x.node for way in values for x in way}) != sum(map(len, values)):
        raise Reject("AR203", "two blocks of weights meet the same values", mixed.output)
    return {"query": [queries], "key": keys, "value": values}


def _build(
    anchor: fx.Node,
    mixed: Mixed,
    ways: dict[Role, list[list[Operand]]],
    scores: Scores,
    axes: Roles,
    region: dict[tuple[Role, fx.Node], Layout],
    reader: MaskReader,
    query_first: bool = True,
    softmax: Softmax | None = None,
    blocks: tuple[Block, Block] | None = None,
) -> Attention:
    heads = axes.kv_heads + axes.groups
    zero = softmax is None or mixed.guard is not None or op(anchor) == "_safe_softmax" or scores.sink is not None
    visibility = reader.read(anchor.graph, scores, axes.rows, axes.cols, heads, zero=zero)
    if any(term.zero_one and not reader.is_zero_one(term.node) for term in scores.terms):
        raise Reject("AR203", "the scores are multiplied by a mask that is not known to hold only 0 and 1", anchor)
    if mixed.no_nan and visibility.empty_rows == "nan":
        visibility.empty_rows = "zero"
    attention = Attention(
        layer=common_layer([scores.contraction, mixed.output]),
        source=source_line(anchor),
        anchor=anchor,
        output=mixed.output,
        output_layout=mixed.layout,
        query=ways["query"][-1][-1],
        key=ways["key"][-1][-1],
        value=ways["value"][-1][-1],
        scores=scores,
        visibility=visibility,
        query_first=query_first,
        probs_first=mixed.probs_first,
        dropout=mixed.dropout,
        gates=mixed.gates,
        guarded=mixed.no_nan or mixed.guard is not None,
        softmax=softmax,
        keys=key_join(blocks, ways["key"]),
        values=mixed.values,
        region=region,
        **vars(axes),
    )
    _settle(attention, ways)
    attention.spelling = _spelling(attention)
    check_regions(attention)
    return attention


def _settle(site: Attention, ways: dict[Role, list[list[Operand]]]) -> None:
    """Choose the values that a rewrite reads."""
    fixed, scores = site.region, site.scores
    site.query = nearest(ways["query"][0], site.query_layout, fixed=fixed, role="query", scores=scores)
    found = dict[Role, list[Operand]]()
    wanted: list[tuple[Role, Layout, Scores | None]] = [
        ("key", site.key_layout, scores),
        ("value", site.value_layout, None),
    ]
    for role, want, scaled in wanted:
        layouts = [(*want[:2], flat(cols), want[3]) for _, cols in site.blocks(role)]
        pairs = zip(ways[role], layouts, strict=True)
        found[role] = [nearest(way, layout, fixed=fixed, role=role, scores=scaled) for way, layout in pairs]
    site.key, site.value = found["key"][-1], found["value"][-1]
    site.keys, site.values = chosen(site.keys, found["key"]), chosen(site.values, found["value"])


def _spelling(site: Attention) -> list[str]:
    """Tag how the model writes this attention."""
    tags = [op(site.anchor), op(site.scores.contraction)]
    tags += [f"{t.kind}:{'mask' if t in site.visibility.terms else 'bias'}" for t in site.scores.terms]
    if site.groups:
        tags.append("grouped heads")
    if site.scores.softcap is not None:
        tags.append("soft-cap")
    if site.scores.factors:
        tags.append("tensor scale")
    if site.scores.sink is not None:
        tags.append("sink")
    if site.gates:
        tags.append("gated weights")
    if site.joins():
        tags.append("joined blocks")
    return tags


def _from_fused(anchor: fx.Node, reader: MaskReader) -> Attention:
    if is_flex(anchor):
        raise Reject("AR203", reason(anchor), anchor)
    query, key, value = anchor.args[:3]
    if not (is_node(query) and is_node(key) and is_node(value)):
        raise Reject("AR203", "attention on values that are no tensors", anchor)
    ranks = {len(shape(query)), len(shape(key)), len(shape(value))}
    if len(ranks) != 1 or ranks.pop() < 2:
        raise Reject("AR203", "operands of different rank", anchor)
    layout = fresh(query, [*(f"x{n}" for n in range(len(shape(query)) - 2)), "i", "d"])
    batch, rows, inner = layout[:-2], layout[-2], layout[-1]
    cols: Dim = (Symbol("j", shape(key)[-2]),)
    outer: Dim = (Symbol("e", shape(value)[-1]),)
    key_batch = batch
    if argument(anchor, 7, "enable_gqa", False) and len(batch) >= 1:
        key_batch = (*batch[:-1], _grouped(batch[-1][0], shape(key)[-3]))
    operands: dict[Role, Operand] = {
        "query": Operand(query, layout),
        "key": Operand(key, broadcast((*key_batch, cols, inner), key)),
        "value": Operand(value, broadcast((*key_batch, cols, outer), value)),
    }
    scores = Scores(anchor, alpha=_fused_scale(anchor, shape(query)[-1]))
    scale_node = anchor.kwargs.get("scale")
    if is_node(scale_node):
        scores.factors.append((scale_node, (), False))
    scores.is_causal = bool(argument(anchor, 5, "is_causal", False))
    mask = argument(anchor, 3, "attn_mask")
    score_layout = (*batch, rows, cols)
    if is_node(mask):
        scores.terms.append(_fused_mask(mask, score_layout))
    region: dict[tuple[Role, fx.Node], Layout] = {("scores", anchor): score_layout}
    chains = {role: peel(role, operand, region, _none(role, scores)) for role, operand in operands.items()}
    output_layout = (*batch, rows, outer)
    axes = tell_roles(chains, inner, outer, cols, score_layout, anchor, output_layout)
    p = constant(argument(anchor, 4, "dropout_p", 0.0))
    mixed = Mixed(anchor, output_layout, operands["value"], dropout=1.0 if p is None else p)
    return _build(anchor, mixed, {role: [chain] for role, chain in chains.items()}, scores, axes, region, reader)


def _none(role: str, scores: Scores) -> Scores | None:
    return None if role == "value" else scores


def _grouped(heads: Symbol, kv_heads: object) -> Dim:
    """Split the head symbol into (kv head, group), as torch's enable_gqa pairs them."""
    if heads.size == kv_heads:
        return (heads,)
    if not isinstance(heads.size, int) or not isinstance(kv_heads, int) or heads.size % kv_heads:
        raise AxisError("head counts that are not known")
    heads.split(kv_heads, heads.size // kv_heads)
    return (heads.parts[0],)


def _fused_scale(anchor: fx.Node, width: object) -> float:
    scale = anchor.kwargs.get("scale")
    if scale is None:
        return 1.0 / math.sqrt(float(str(width)))
    number = constant(scale)
    return 1.0 if number is None else number


def _fused_mask(mask: fx.Node, layout: Layout) -> Term:
    value = mask.meta["val"]
    where = broadcast(layout, mask)
    if str(value.dtype) == "torch.bool":
        return Term("fill", mask, where, value=float("-inf"), when=False)
    return Term("add", mask, where)
