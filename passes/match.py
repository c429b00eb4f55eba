"""Find attention: from each softmax-like anchor outwards to an Attention, or to a Rejection with a code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from attnrewrite.passes import scores as score_form
from attnrewrite.passes.attention import Attention, Operand, Reject, Role, Scores, Term
from attnrewrite.passes.axes import (
    AxisError,
    Dim,
    Layout,
    Symbol,
    backward,
    broadcast,
    flat,
    forward,
    fresh,
    symbols,
)
from attnrewrite.passes.capture import Capture
from attnrewrite.passes.contract import from_operand, from_result
from attnrewrite.passes.graph import argument, common_layer, is_node, op, shape, source_line
from attnrewrite.passes.masks import MaskReader
from attnrewrite.passes.regions import check_regions
from attnrewrite.passes.report import Rejection
from attnrewrite.passes.scores import CONTRACTIONS, constant

SOFTMAX = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}
FUSED = {"scaled_dot_product_attention"}


@dataclass
class Found:
    """Everything the recogniser says about one graph."""

    attentions: list[Attention] = field(default_factory=list)
    refused: list[tuple[fx.Node, Rejection]] = field(default_factory=list)
    not_attention: list[Rejection] = field(default_factory=list)


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that may be the heart of an attention, in order."""
    for node in graph.nodes:
        if op(node) in SOFTMAX | FUSED:
            yield node


def match(capture: Capture) -> Found:
    """Recognise every attention of every graph of ``capture``."""
    found, reader = Found(), MaskReader(capture)
    for module in capture.graphs():
        for anchor in anchors(module.graph):
            try:
                found.attentions.append(_match(anchor, reader))
            except (Reject, AxisError) as error:
                reject = error if isinstance(error, Reject) else Reject("AR203", str(error), anchor)
                place = reject.node if reject.node is not None else anchor
                row = reject.rejection(common_layer([anchor]), source_line(place) or source_line(anchor))
                if reject.code == "AR202":
                    found.not_attention.append(row)
                else:
                    found.refused.append((anchor, row))
    return found


def _match(anchor: fx.Node, reader: MaskReader) -> Attention:
    return (_from_fused if op(anchor) in FUSED else _from_softmax)(anchor, reader)


def _from_softmax(anchor: fx.Node, reader: MaskReader) -> Attention:
    start = anchor.args[0]
    if not is_node(start):
        raise Reject("AR202", "the softmax has no tensor input", anchor)
    layout = fresh(anchor, [f"x{n}" for n in range(len(shape(anchor)))])
    axis = int(argument(anchor, 1, "dim")) % len(layout)
    cols = layout[axis]
    scores, walk = score_form.read(start, layout, cols)
    product = from_result(scores.contraction, walk.layout, "d")
    query, key = _query_and_key(product, cols, anchor)
    region: dict[tuple[Role, fx.Node], Layout] = dict(walk.region)
    mixed = _follow_probs(anchor, layout, cols, region)
    chains = {
        "query": _peel("query", query, region, scores),
        "key": _peel("key", key, region, scores),
        "value": _peel("value", mixed.value, region, None),
    }
    outer = tuple(s for s in symbols(mixed.layout) if s not in set(symbols(layout)))
    axes = _roles(chains, product.summed, outer, cols, walk.layout, mixed.output, mixed.layout)
    return _build(anchor, mixed, chains, scores, axes, region, reader, query.layout is product.left_layout)


def _query_and_key(product: Contraction, cols: Dim, anchor: fx.Node) -> tuple[Operand, Operand]:
    left, right = Operand(product.left, product.left_layout), Operand(product.right, product.right_layout)
    in_left, in_right = (set(flat(cols)) & set(symbols(o.layout)) for o in (left, right))
    if in_left and in_right or not (in_left or in_right):
        raise Reject("AR203", "the softmax axis does not belong to one operand of the product", anchor)
    query, key = (left, right) if in_right else (right, left)
    return query, key


@dataclass
class _Mixed:
    """The product of probabilities and values: the site's output, its layout, the values, and the dropout before."""

    output: fx.Node
    layout: Layout
    value: Operand
    probs_first: bool = True
    dropout: float = 0.0


def _follow_probs(start: fx.Node, layout: Layout, cols: Dim, region: dict[tuple[Role, fx.Node], Layout]) -> _Mixed:
    """Follow the probabilities to the product with the values."""
    blocked: fx.Node | None = None
    region["probs", start] = layout
    for user in start.users:
        if op(user) in CONTRACTIONS:
            mixed = _mix(user, start, layout, cols)
            if mixed is not None:
                return mixed
            continue
        try:
            moved = _probs_step(user, start, layout)
            if moved is not None:
                mixed = _follow_probs(user, moved, cols, region)
                mixed.dropout = max(mixed.dropout, _dropout(user))
                return mixed
        except AxisError:
            continue
        except Reject as reject:
            blocked = reject.node if reject.code == "AR203" else blocked
            continue
        if op(user) in ("mul", "masked_fill", "where", "div", "add"):
            blocked = user
    region.pop(("probs", start))
    if blocked is not None:
        raise Reject("AR203", f"{blocked.target} changes the attention weights after the softmax", blocked)
    raise Reject("AR202", "the softmax's result is not contracted with values along the same axis", start)


def _mix(user: fx.Node, node: fx.Node, layout: Layout, cols: Dim) -> _Mixed | None:
    product = from_operand(user, node, layout, cols, "e")
    if product is None:
        return None
    left = Operand(product.left, product.left_layout)
    right = Operand(product.right, product.right_layout)
    first = left.node is node
    return _Mixed(user, product.result, right if first else left, first)


def _probs_step(user: fx.Node, node: fx.Node, layout: Layout) -> Layout | None:
    if not user.args or user.args[0] is not node:
        return None
    return layout if op(user) == "dropout" else forward(layout, user)


def _dropout(node: fx.Node) -> float:
    if op(node) != "dropout" or argument(node, 2, "train") is False:
        return 0.0
    p = constant(argument(node, 1, "p"))
    return 1.0 if p is None else p


def _peel(role: Role, operand: Operand, region: dict[tuple[Role, fx.Node], Layout], scores: Scores | None) -> list[Operand]:
    """Walk from the contraction towards the projection through moves of axes and constant scales.

    Returns the values passed on the way, the contraction's operand first.
    """
    chain = [operand]
    while True:
        node, layout = chain[-1].node, chain[-1].layout
        if node.op != "call_function" or _in_place(node):
            break
        try:
            moved = backward(layout, node)
        except AxisError:
            break
        if moved is None:
            number, source = _constant_scale(node)
            if scores is None or source is None or number is None:
                break
            moved = source, layout
            scores.alpha *= number
        region[role, node] = layout
        chain.append(Operand(*moved))
    return chain


def _in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _constant_scale(node: fx.Node) -> tuple[float | None, fx.Node | None]:
    if op(node) not in ("mul", "div") or len(node.args) < 2 or node.kwargs.get("rounding_mode"):
        return None, None
    a, b = node.args[0], node.args[1]
    if op(node) == "mul" and constant(a) is not None:
        a, b = b, a
    number = constant(b)
    if not is_node(a) or number is None or number == 0 or len(shape(a)) != len(shape(node)):
        return None, None
    return (1.0 / number if op(node) == "div" else number), a


@dataclass
class _Axes:
    batch: Dim
    kv_heads: Dim
    groups: Dim
    rows: Dim
    cols: Dim
    inner: Dim
    outer: Dim


def _roles(
    chains: dict[str, list[Operand]],
    inner: Dim,
    outer: Dim,
    cols: Dim,
    score_layout: Layout,
    output: fx.Node,
    output_layout: Layout,
) -> _Axes:
    """Tell batch, heads, groups and rows apart.

    Heads are the symbols that lie beside the head dim in the projections: folded with it in the output's way to the
    output projection, or in the query's way from its projection.
    """
    heads = set(_heads_ahead(output, output_layout, outer))
    heads |= _beside(chains["query"], inner) | _beside(chains["value"], outer)
    heads -= set(flat(cols)) | set(flat(inner)) | set(flat(outer))
    every = [s for s in symbols(score_layout) if s not in set(flat(cols))]
    in_query = set(symbols(chains["query"][-1].layout))
    in_key, in_value = (set(symbols(chains[x][-1].layout)) for x in ("key", "value"))
    if not heads and len(score_layout) == 4 and len(flat(score_layout[1])) and score_layout[1] != cols:
        heads = {s for s in flat(score_layout[1]) if s in in_key and s in in_value}
    only_query = [s for s in every if s in in_query and s not in in_key and s not in in_value]
    rows = tuple(s for s in only_query if s not in heads)
    kv = tuple(s for s in every if s in heads and s in in_key | in_value)
    groups = tuple(s for s in every if s in heads and s not in in_key | in_value)
    batch = tuple(s for s in every if s not in set(rows) | heads)
    return _Axes(batch, kv, groups, rows, flat(cols), flat(inner), flat(outer))


def _beside(chain: list[Operand], inner: Dim) -> set[Symbol]:
    found: set[Symbol] = set()
    for operand in chain:
        for dim in operand.layout:
            line = flat(dim)
            if len(line) > 1 and set(flat(inner)) & set(line):
                found |= set(line) - set(flat(inner))
    return found


def _heads_ahead(node: fx.Node, layout: Layout, outer: Dim, depth: int = 8) -> set[Symbol]:
    """Follow the output through moves of axes until heads and value dim are folded into one."""
    folded = _beside([Operand(node, layout)], outer)
    if folded or depth == 0:
        return folded
    for user in node.users:
        if not user.args or user.args[0] is not node:
            continue
        try:
            moved = forward(layout, user)
        except AxisError:
            continue
        if moved is not None:
            found = _heads_ahead(user, moved, outer, depth - 1)
            if found:
                return found
    return set()


def _build(
    anchor: fx.Node,
    mixed: _Mixed,
    chains: dict[str, list[Operand]],
    scores: Scores,
    axes: _Axes,
    region: dict[tuple[Role, fx.Node], Layout],
    reader: MaskReader,
    query_first: bool = True,
) -> Attention:
    heads = axes.kv_heads + axes.groups
    fused = op(anchor) in FUSED
    visibility = reader.read(anchor.graph, scores, axes.rows, axes.cols, heads, sdpa=fused)
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
        region=region,
        **vars(axes),
    )
    attention.query = _nearest(chains["query"], attention.query_layout, fixed=region, role="query", scores=scores)
    attention.key = _nearest(chains["key"], attention.key_layout, fixed=region, role="key", scores=scores)
    attention.value = _nearest(chains["value"], attention.value_layout, fixed=region, role="value", scores=None)
    attention.spelling = _spelling(attention)
    check_regions(attention)
    return attention


def _nearest(
    chain: list[Operand],
    want: Layout,
    *,
    fixed: dict[tuple[Role, fx.Node], Layout],
    role: Role,
    scores: Scores | None,
) -> Operand:
    """Prefer the value nearest to the contraction that already has the wanted layout and lies behind all scales."""
    chosen = chain[-1]
    for operand in reversed(chain):
        if scores is not None and _constant_scale(operand.node)[0] is not None and (role, operand.node) in fixed:
            break
        if tuple(flat(d) for d in operand.layout) == want:
            chosen = operand
    keep = chain[: chain.index(chosen)]
    for operand in chain:
        if operand not in keep:
            fixed.pop((role, operand.node), None)
    return chosen


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
    return tags


def _from_fused(anchor: fx.Node, reader: MaskReader) -> Attention:
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
    chains = {role: _peel(role, operand, region, _none(role, scores)) for role, operand in operands.items()}  # type: ignore[arg-type]  # the keys are roles
    output_layout = (*batch, rows, outer)
    axes = _roles(chains, inner, outer, cols, score_layout, anchor, output_layout)
    p = constant(argument(anchor, 4, "dropout_p", 0.0))
    mixed = _Mixed(anchor, output_layout, operands["value"], dropout=1.0 if p is None else p)
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
        return float(width) ** -0.5  # type: ignore[arg-type]  # head dims are ints
    number = constant(scale)
    return 1.0 if number is None else number


def _fused_mask(mask: fx.Node, layout: Layout) -> Term:
    value = mask.meta["val"]
    where = broadcast(layout, mask)
    if str(value.dtype) == "torch.bool":
        return Term("fill", mask, where, value=float("-inf"), when=False)
    return Term("add", mask, where)

