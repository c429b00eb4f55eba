"""Backward pass of the dense family, by keys: one program per block of keys, over all rows and heads that see it.

Of wide heads a program makes dk or dv: registers do not hold both.
"""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, bent, narrow, scored, survives, tile


@triton.jit
def attention_backward_keys(
    Q,  # [B, H, L, D]
    K,  # [B, Hkv, S, D]
    V,  # [B, Hkv, S, Dv]
    DOut,  # [B, H, L, Dv]
    Lse,  # [B, H, L], in base 2
    Delta,  # [B, H, L], sum of out * dout over features
    DKey,  # [B, Hkv, S, D]
    DValue,  # [B, Hkv, S, Dv]
    DValueTau,  # [B, Hkv, S]
    QueryTau,  # [B, H, L]
    ValueTau,  # [B, Hkv, S]
    Mask,  # [B, H, L, S], any stride may be 0
    Penalty,  # [B, L, S], times log2(e)
    Death,  # [B, S], the first row from which on a key counts for nothing
    Slopes,  # [H]
    Seed,  # one int64
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_gb,  # of dout
    stride_gh,
    stride_gm,
    stride_gd,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_pb,
    stride_pm,
    B,
    H,
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    window,
    scale,
    softcap,
    threshold,  # of dropout: p * 2**32
    kept,  # of dropout: 1 / (1 - p)
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,  # powers of two, 16 at least
    PAD_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,  # "none", "keys" (one row for all queries), "pairs", "bias"
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    PENALTY: tl.constexpr,
    SKIPS: tl.constexpr,  # whether to leave out what Death says
    TEMPERATURES: tl.constexpr,
    GRADIENTS: tl.constexpr,  # "both", "keys" or "values": what is made
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    DESCRIPTORS: tl.constexpr,  # whether tiles come by the TMA unit
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dk, dv and the gradient by the value temperatures. Tiles stand keys by queries."""
    ADDED: tl.constexpr = SOFTCAP or ALIBI or PENALTY or MASK == "bias"
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_N)
    heads = H // GROUP
    if PENALTY:
        # Heads side by side: they share a tile of the penalty, which then comes from the L2 cache.
        bh = pid % (B * heads)
        block = pid // (B * heads)
    else:
        bh = pid // blocks
        block = pid % blocks
    b = (bh // heads).to(tl.int64)
    hk = (bh % heads).to(tl.int64)
    first = block * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_D)
    dv = tl.arange(0, PAD_DV)
    cols = first + n
    j = cols[:, None]
    K += b * stride_kb + hk * stride_kh + first.to(tl.int64) * stride_kn
    V += b * stride_vb + hk * stride_vh + first.to(tl.int64) * stride_vn
    k = tile(K, n[:, None], d[None, :], stride_kn, stride_kd, S - first, True, D, PAD_D)
    if GRADIENTS != "values":
        v = tile(V, n[:, None], dv[None, :], stride_vn, stride_vd, S - first, True, DV, PAD_DV)
        if UPCAST:
            v = v.to(tl.float32)
    if UPCAST:
        k = k.to(tl.float32)
    if TEMPERATURES and GRADIENTS != "values":
        rho = tl.load(ValueTau + bh.to(tl.int64) * S + cols, mask=cols < S, other=0.0).to(tl.float32)
    if PENALTY:
        Penalty += b * stride_pb
    if DESCRIPTORS:
        queries = tl.make_tensor_descriptor(
            Q + b * stride_qb, [H, L, D], [stride_qh, stride_qm, 1], [1, BLOCK_M, PAD_D]
        )
        gradients = tl.make_tensor_descriptor(
            DOut + b * stride_gb, [H, L, DV], [stride_gh, stride_gm, 1], [1, BLOCK_M, PAD_DV]
        )
    if DESCRIPTORS and PENALTY:
        penalties = tl.make_tensor_descriptor(Penalty, [L, S], [stride_pm, 1], [BLOCK_M, BLOCK_N])

    # Rows [low, high) see some key of the block, [all_low, all_high) every key.
    low = 0
    high = L
    all_low = 0
    all_high = L // BLOCK_M * BLOCK_M
    if CAUSAL:
        low = tl.maximum(0, first - offset) // BLOCK_M * BLOCK_M
        all_low = tl.cdiv(tl.maximum(0, first + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
    if WINDOW:
        high = tl.minimum(L, tl.maximum(0, first + BLOCK_N - 1 + window - offset))
        all_high = tl.minimum(all_high, tl.maximum(0, first + window - offset) // BLOCK_M * BLOCK_M)
    if SKIPS:
        high = tl.minimum(high, tl.max(tl.load(Death + b * S + cols, mask=cols < S, other=0), 0))
        all_high = tl.minimum(all_high, high // BLOCK_M * BLOCK_M)
    all_low = tl.minimum(all_low, tl.maximum(low, tl.cdiv(high, BLOCK_M) * BLOCK_M))
    all_high = tl.maximum(all_low, all_high)

    dk = tl.zeros([BLOCK_N, PAD_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, PAD_DV], tl.float32)
    for PART in tl.static_range(3):
        if PART == 1 or PART == 2 or CAUSAL:
            if PART == 0:  # the diagonal
                start = low
                stop = all_low
            elif PART == 1:  # no position hides anything
                start = all_low
                stop = all_high
            else:  # the edge of the window, and the end of the sequence
                start = all_high
                stop = high
            # Rows of all heads of the group in one loop: with a loop for each, registers would hold keys and values.
            for step in tl.range(0, tl.cdiv(stop - start, BLOCK_M) * GROUP):
                first_row = start + step // GROUP * BLOCK_M
                h = hk * GROUP + step % GROUP
                row_of = (b * H + h) * L
                M_head = Mask
                if MASK != "none":
                    M_head = Mask + b * stride_mb + h * stride_mh
                slope = 0.0
                if ALIBI:
                    slope = tl.load(Slopes + h).to(tl.float32)
                rows = first_row + m
                i = rows[None, :]
                if DESCRIPTORS:
                    q = queries.load([h.to(tl.int32), first_row, 0]).reshape(BLOCK_M, PAD_D)
                    grad = gradients.load([h.to(tl.int32), first_row, 0]).reshape(BLOCK_M, PAD_DV)
                else:
                    place = tl.cast(first_row, tl.int64)
                    Q_tile = Q + b * stride_qb + h * stride_qh + place * stride_qm
                    G_tile = DOut + b * stride_gb + h * stride_gh + place * stride_gm
                    left = L - first_row
                    q = tile(Q_tile, m[:, None], d[None, :], stride_qm, stride_qd, left, PART != 1, D, PAD_D)
                    grad = tile(G_tile, m[:, None], dv[None, :], stride_gm, stride_gd, left, PART != 1, DV, PAD_DV)
                lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float("inf"))
                lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees no key
                delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
                if TEMPERATURES:
                    tau = tl.load(QueryTau + row_of + rows, mask=rows < L, other=0.0).to(tl.float32)
                    q = narrow(q.to(tl.float32) * tau[:, None], Q, UPCAST)
                if UPCAST:
                    q = q.to(tl.float32)
                    grad = grad.to(tl.float32)
                if PENALTY and DESCRIPTORS:
                    taken = tl.trans(penalties.load([first_row, first]))
                elif PENALTY:
                    taken = tl.load(Penalty + i.to(tl.int64) * stride_pm + j, mask=(i < L) & (j < S), other=0.0)
                else:
                    taken = 0.0
                product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                s = product
                s = scored(
                    s,
                    i,
                    j,
                    L,
                    S,
                    offset,
                    window,
                    scale,
                    softcap,
                    slope,
                    M_head,
                    stride_mm,
                    stride_mn,
                    taken,
                    PART != 1,
                    CAUSAL,
                    WINDOW,
                    MASK,
                    SOFTCAP,
                    ALIBI,
                    PENALTY,
                )
                p = tl.exp2(s - lse[None, :]) if ADDED else tl.exp2(s * (scale * LOG2E) - lse[None, :])
                if DROPOUT:
                    alive = survives(i, j, (b * H + h).to(tl.int32), Seed, threshold)
                if GRADIENTS != "values":
                    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                    if TEMPERATURES:
                        dp = dp * rho[:, None]
                    if DROPOUT:
                        dp = tl.where(alive, dp * kept, 0.0)
                    ds = p * (dp - delta[None, :])
                    if SOFTCAP:
                        t = bent(product, scale, softcap)
                        ds = ds * (1 - t * t)
                    ds = narrow(ds, Q, UPCAST)
                if GRADIENTS != "keys":
                    if DROPOUT:
                        p = tl.where(alive, p * kept, 0.0)
                    p = narrow(p, V, UPCAST)
                    dvalue += tl.dot(p, grad, input_precision=PRECISION)
                if GRADIENTS != "values":
                    dk += tl.dot(ds, q, input_precision=PRECISION)

    n_global = (bh.to(tl.int64) * S + cols)[:, None]
    if GRADIENTS != "keys":
        scaled = dvalue
        if TEMPERATURES:
            rho = tl.load(ValueTau + bh.to(tl.int64) * S + cols, mask=cols < S, other=0.0).to(tl.float32)
            scaled = dvalue * rho[:, None]
        scaled = scaled.to(DValue.dtype.element_ty)
        tl.store(DValue + n_global * DV + dv[None, :], scaled, mask=(j < S) & (dv[None, :] < DV))
        if TEMPERATURES:
            # Loaded in another way than before the loop: else the compiler keeps them in registers all the time.
            places = n[:, None].to(tl.int64) * stride_vn + dv[None, :] * stride_vd
            bare = tl.load(V + places, (j < S) & (dv[None, :] < DV), 0.0, eviction_policy="evict_first")
            gained = tl.sum(dvalue * bare.to(tl.float32), 1)
            tl.store(DValueTau + bh.to(tl.int64) * S + cols, gained, mask=cols < S)
    if GRADIENTS != "values":
        dk = narrow(dk * scale, DKey, UPCAST)
        tl.store(DKey + n_global * D + d[None, :], dk, mask=(j < S) & (d[None, :] < D))
