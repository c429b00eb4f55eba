"""Routing attention in plain PyTorch, a few clusters at a time: the specification of every other implementation."""

from __future__ import annotations

from torch import Tensor

from attnrewrite.kernels.routing.attend import attend
from attnrewrite.kernels.routing.prepare import Options, Routed, check_routing, prepare
from attnrewrite.kernels.visibility import check_attention, full_precision


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    rule: str = "argmax_window",
    window_size: int | None = None,
    shared_qk: bool = False,
    logits: str = "raw",
    center_query: Tensor | None = None,
    center_key: Tensor | None = None,
    routing_query: Tensor | None = None,
    routing_key: Tensor | None = None,
    valid: Tensor | None = None,
    key_cluster: Tensor | None = None,
    position: Tensor | None = None,
    paper_causal: bool = False,
) -> Tensor:
    """Attention among tokens that lie near the same centroid (Routing Transformer, arXiv 2003.05997).

    With r the routing features (``LN0(x - center)``: mean 0, mean square 1) and a = r . mu the affinities::

        topw             I_c = the window_size tokens nearest to centroid c; queries and keys of the same c meet;
                         a query in several clusters gets the mean of its outputs, in none gets 0
        argmax_window    cl(x) = argmax_c a; query i meets window_size keys of cluster cl(q_i) around it: causal
                         the last j <= i, else half of them j <= i and half j > i; and its own key unless shared_qk
        o_i              = softmax_j(scale s_i . t_j + bias_ij) v_j over the keys it meets

    where s, t are query and key (``logits="raw"``) or their routing features (``"normed"``). ``topw`` is the paper's
    rule; ``argmax_window`` is ours and depends, under ``is_causal``, on no later token. Features, logits and sums are
    float32 (float64 for float64 inputs); nothing of size L x S is made. Ties go to the lower cluster or position.

    Warning: ``topw`` with ``is_causal`` masks later keys, but later tokens decide who belongs to a cluster, so that
    they change earlier outputs, and decoding token by token gives something else. It needs ``paper_causal=True``.

    Args:
        query: ``[B, H, L, D]``, any floating-point dtype.
        key: ``[B, Hkv, S, D]``; L = S unless ``rule="topw"`` or with ``key_cluster``. Not used with ``shared_qk``: pass
            the query.
        value: ``[B, Hkv, S, Dv]``.
        centroids: ``[Hkv, C, D]``, best in float32; the query heads of a group share those of their KV head.
        attn_mask: boolean ``[B, 1, 1, S]`` (False = padded: neither routed nor seen, and where L = S also 0 as a
            query), or a bias that broadcasts to ``[B, H, L, S]`` (-inf = invisible; if it is ``[B, 1, 1, S]``, padded).
        dropout_p: probability of dropping an attention weight; applied whenever it is not 0.
        is_causal: key j is visible to query i iff j <= i.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H; KV head g serves the query heads of its group of H / Hkv.
        window: with ``is_causal``, key j is visible to query i iff also i - j < window.
        rule: ``"argmax_window"`` or ``"topw"``.
        window_size: members per cluster (``topw``), keys per query (``argmax_window``); ``ceil(N / C)`` if None,
            which depends on the length: pass a number where lengths vary.
        shared_qk: the query is the key, too; a token meets itself with logit -5e4. Needs H = Hkv and L = S.
        logits: ``"raw"`` scores query and key as given, ``"normed"`` their routing features.
        center_query: ``[Hkv, D]``, subtracted from queries before routing.
        center_key: ``[Hkv, D]``, subtracted from keys before routing.
        routing_query: ``[B, H, L, D]``, what is routed in place of the query, e.g. before rotary embedding.
        routing_key: ``[B, Hkv, S, D]``, what is routed in place of the key.
        valid: boolean ``[B, S]``, False = padded, as by a mask ``[B, 1, 1, S]``; for use beside a bias.
        key_cluster: integers ``[B, Hkv, S]``, in place of routing the keys: the cluster of each, C where it is padded.
            The queries then are the last L of the S positions, and with ``shared_qk`` the key holds all S queries.
            For causal ``argmax_window`` with a cache.
        position: a number, where query 0 stands among the keys of a cache of fixed size; ``S - L`` if None.
        paper_causal: allow ``topw`` with ``is_causal``.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``, differentiable in query, key, value and a bias. Membership has
        no gradient, nor have centroids, centers and what is routed only.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        window=window,
    )
    options = Options(rule, window_size, shared_qk, logits, is_causal, scale, window, paper_causal)
    routed = Routed(
        query,
        key,
        value,
        centroids,
        attn_mask,
        center_query,
        center_key,
        routing_query,
        routing_key,
        valid,
        key_cluster,
        position,
    )
    check_routing(routed, options)
    with full_precision(query.device):
        scored, selection = prepare(routed, options)
        return attend(scored, selection, dropout_p).to(query.dtype)
