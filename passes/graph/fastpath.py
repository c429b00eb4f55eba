"""One operator that does the work of several is taken apart, so that the attention in it can be seen.

``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call opaque operators in eval mode without gradients:
torch's encoder fast path. What takes their place is the same layer in ordinary operators, traced. An einsum of more
than two operands becomes products of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.passes.graph.nodes import op

_SRC_MASK, _PADDING_MASK = 0, 1


def expand(module: fx.GraphModule) -> None:
    """Replace every fast-path operator of ``module``, and every long einsum, by ordinary operators."""
    for node in list(module.graph.nodes):
        function = _FUNCTIONS.get(op(node))
        if function is not None and (op(node) != "einsum" or _is_long(node)):
            _replace(node, function)


def _is_long(node: fx.Node) -> bool:
    inputs, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    return bool(arrow) and inputs.count(",") > 1 and (inputs.replace(",", "") + result).isalpha()


def _replace(node: fx.Node, function: Callable[..., Any]) -> None:
    nodes = node.all_input_nodes

    def layer(*values: Tensor) -> Any:
        given = dict(zip(nodes, values, strict=True))
        return function(*fx.map_arg(node.args, given.__getitem__), **fx.map_arg(node.kwargs, given.__getitem__))

    values = [x.meta["val"] for x in nodes]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with mode:
        traced = make_fx(layer, pre_dispatch=True, tracing_mode="real")(*values)
    places = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    before = node.prev
    with node.graph.inserting_before(node):
        out = node.graph.graph_copy(traced.graph, places)
    new = before.next
    while new is not node:
        new.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        new = new.next
    if isinstance(out, fx.Node):
        node.replace_all_uses_with(out)
    else:
        _replace_items(node, out)  # type: ignore[arg-type]  # the operator returns a pair
    node.graph.erase_node(node)


def _replace_items(node: fx.Node, results: tuple[fx.Node | None, ...]) -> None:
    for item in list(node.users):
        result = results[int(item.args[1])]  # type: ignore[arg-type]  # an int by operator.getitem
        assert result is not None
        item.replace_all_uses_with(result)
        node.graph.erase_node(item)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    qkv: tuple[Tensor, Tensor],
    projection: tuple[Tensor, Tensor],
    mask: Tensor | None,
    mask_type: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, L, E] and the weights [B, H, L, S] of multi-head attention."""
    weights, biases = qkv[0].chunk(3), qkv[1].chunk(3)

    def project(x: Tensor, n: int) -> Tensor:
        y = F.linear(x, weights[n], biases[n])
        return y.view(*y.shape[:-1], heads, -1).transpose(1, 2)  # [B, H, L, D]

    q, k, v = project(query, 0), project(key, 1), project(value, 2)
    scores = q @ k.mT * (q.shape[-1] ** -0.5)
    if mask is not None:
        mask = mask[:, None, None] if mask_type == _PADDING_MASK else mask
        scores = scores.masked_fill(mask.bool(), float("-inf"))
    probs = torch.softmax(scores, -1)
    out = (probs @ v).transpose(1, 2).flatten(2)
    return F.linear(out, *projection), probs


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    projection = (proj_weight, proj_bias)
    out, probs = _attend(query, key, value, heads, (qkv_weight, qkv_bias), projection, mask, mask_type)
    if not need_weights:
        return out, None
    return out, probs.mean(1) if average_attn_weights else probs


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    def attend(x: Tensor) -> Tensor:
        return _attend(x, x, x, heads, (qkv_weight, qkv_bias), (proj_weight, proj_bias), mask, mask_type)[0]

    def feed_forward(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first(src))
        return x + feed_forward(second(x))
    x = first(src + attend(src))
    return second(x + feed_forward(x))


def _einsum(equation: str, operands: list[Tensor], **path: Any) -> Tensor:
    """Multiply from left to right, as torch does; what neither a later operand nor the result names is summed."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms, values = inputs.split(","), list(operands)
    while len(terms) > 2:
        first, second, *rest = terms
        kept = "".join(x for x in dict.fromkeys(first + second) if x in "".join(rest) + result)
        values[:2] = [torch.einsum(f"{first},{second}->{kept}", *values[:2])]
        terms = [kept, *rest]
    return torch.einsum(f"{terms[0]},{terms[1]}->{result}", *values)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "einsum": _einsum,
    "_native_multi_head_attention": _multi_head_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
