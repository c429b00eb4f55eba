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
from attnrewrite.passes.matching.others import is_attention_like, kind_of
from attnrewrite.passes.matching.probs import Follower, Mixed
from attnrewrite.passes.patterns import registry as patterns
from attnrewrite.passes.report import Rejection

FUSED = {"scaled_dot_product_attention"}


@dataclass
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
    if failure.code != "AR202" or softmax is None or not is_attention_like(softmax):
        return failure
    detail = failure.detail
    if detail == score_form.NO_PRODUCT and failure.node is not None:
        detail = f"{failure.node.target} stands between the query-key product and the softmax"
    return Reject("AR203", detail, failure.node)


def _from_softmax(softmax: Softmax, reader: MaskReader) -> Attention:
    anchor = softmax.node
    layout = fresh(anchor, [f"x{n}" for n in range(len(shape(anchor)))])
    scores, walk = score_form.read(softmax, layout)
    if not scores.contraction.meta["val"].dtype.is_floating_point:
        raise Reject("AR203", "the queries and keys are integers or complex numbers", scores.contraction)
    product = from_result(scores.contraction, walk.layout, "d")
    query, key = _query_and_key(product, walk.cols, anchor)
    region: dict[tuple[Role, fx.Node], Layout] = dict(walk.region)
    region |= {("probs", step): layout for step in softmax.steps}
    mixed = Follower(scores, region, walk.cols).follow(anchor, layout)
    finite = mixed.guard is not None and mixed.guard.value != -math.inf
    if mixed.guard is not None:
        mixed.guard.value = -math.inf  # a filled row gives 0 in the end: what fused operators make of -inf
    chains = {
        "query": peel("query", query, region, scores),
        "key": peel("key", key, region, scores),
        "value": peel("value", mixed.value, region, None),
    }
    outer = tuple(s for s in symbols(mixed.layout) if s not in set(symbols(walk.layout)))
    axes = tell_roles(chains, product.summed, outer, walk.cols, walk.layout, mixed.output, mixed.layout)
    query_first = query.layout is product.left_layout
    site = _build(anchor, mixed, chains, scores, axes, region, reader, query_first, softmax)
    seen = site.visibility
    sure = seen.rows_never_empty and seen.bias_is_small
    if finite and not sure and any(term.kind == "add" for term in scores.terms):
        # A bias as low as the fill would share its row with keys that are zeroed afterwards.
        raise Reject("AR203", "weights are zeroed after the softmax, beside a finite fill and a bias", anchor)
    return site


def _query_and_key(product: Contraction, cols: Dim, anchor: fx.Node) -> tuple[Operand, Operand]:
    left, right = Operand(product.left, product.left_layout), Operand(product.right, product.right_layout)
    in_left, in_right = (set(flat(cols)) & set(symbols(o.layout)) for o in (left, right))
    if (in_left and in_right) or not (in_left or in_right):
        raise Reject("AR203", "the softmax axis does not belong to one operand of the product", anchor)
    query, key = (left, right) if in_right else (right, left)
    return query, key


def _build(
    anchor: fx.Node,
    mixed: Mixed,
    chains: dict[str, list[Operand]],
    scores: Scores,
    axes: Roles,
    region: dict[tuple[Role, fx.Node], Layout],
    reader: MaskReader,
    query_first: bool = True,
    softmax: Softmax | None = None,
) -> Attention:
    heads = axes.kv_heads + axes.groups
    zero = softmax is None or mixed.guard is not None or op(anchor) == "_safe_softmax"
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
        query=chains["query"][-1],
        key=chains["key"][-1],
        value=chains["value"][-1],
        scores=scores,
        visibility=visibility,
        query_first=query_first,
        probs_first=mixed.probs_first,
        dropout=mixed.dropout,
        gates=mixed.gates,
        guarded=mixed.no_nan or mixed.guard is not None,
        softmax=softmax,
        region=region,
        **vars(axes),
    )
    attention.query = nearest(chains["query"], attention.query_layout, fixed=region, role="query", scores=scores)
    attention.key = nearest(chains["key"], attention.key_layout, fixed=region, role="key", scores=scores)
    attention.value = nearest(chains["value"], attention.value_layout, fixed=region, role="value", scores=None)
    attention.spelling = _spelling(attention)
    check_regions(attention)
    return attention


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
    operands = {
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
    chains = {role: peel(role, operand, region, _none(role, scores)) for role, operand in operands.items()}  # type: ignore[arg-type]  # the keys are roles
    output_layout = (*batch, rows, outer)
    axes = tell_roles(chains, inner, outer, cols, score_layout, anchor, output_layout)
    p = constant(argument(anchor, 4, "dropout_p", 0.0))
    mixed = Mixed(anchor, output_layout, operands["value"], dropout=1.0 if p is None else p)
    return _build(anchor, mixed, chains, scores, axes, region, reader)


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
