"""Backward pass of the dense family, by queries: one program per block of rows, over all keys that it sees."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, apart, bent, narrow, scored, survives, tile


@triton.jit
def attention_backward_queries(
    Q,  # [B, H, L, D]
    K,  # [B, Hkv, S, D]
    V,  # [B, Hkv, S, Dv]
    DOut,  # [B, H, L, Dv]
    Lse,  # [B, H, L], in base 2
    Delta,  # [B, H, L], sum of out * dout over features
    DQuery,  # [B, H, L, D]
    DQueryTau,  # [B, H, L]
    DBias,  # [B, H, L, S]
    DSlopes,  # [B, H, L], of each row
    QueryTau,  # [B, H, L]
    ValueTau,  # [B, Hkv, S]
    Mask,  # [B, H, L, S], any stride may be 0
    Penalty,  # [B, L, S], times log2(e)
    Live,  # [B, blocks of rows, blocks of keys]: blocks of keys that count for a block of rows, in order
    Lives,  # [B, blocks of rows], how many
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
    SKIPS: tl.constexpr,  # whether Live says what to visit of the keys that every row sees
    TEMPERATURES: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    SLOPE_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    DESCRIPTORS: tl.constexpr,  # whether tiles come by the TMA unit
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dq, and the gradients by the query temperatures, the bias and the slopes."""
    ADDED: tl.constexpr = SOFTCAP or ALIBI or PENALTY or MASK == "bias"
    pid = tl.program_id(0)
    blocks = tl.cdiv(L, BLOCK_M)
    if PENALTY:
        # Heads side by side: they share a tile of the penalty, which then comes from the L2 cache.
        bh = pid % (B * H)
        block = pid // (B * H)
    else:
        bh = pid // blocks
        block = pid % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the rows that see most keys start first
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    hk = h // GROUP
    first_row = block * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_D)
    dv = tl.arange(0, PAD_DV)
    rows = first_row + m
    i = rows[:, None]
    row_of = bh.to(tl.int64) * L
    Q += b * stride_qb + h * stride_qh + first_row.to(tl.int64) * stride_qm
    DOut += b * stride_gb + h * stride_gh + first_row.to(tl.int64) * stride_gm
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    q = tile(Q, m[:, None], d[None, :], stride_qm, stride_qd, L - first_row, True, D, PAD_D)
    grad = tile(DOut, m[:, None], dv[None, :], stride_gm, stride_gd, L - first_row, True, DV, PAD_DV)
    lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees no key
    delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
    if TEMPERATURES:
        tau = tl.load(QueryTau + row_of + rows, mask=rows < L, other=0.0).to(tl.float32)
        q = narrow(q.to(tl.float32) * tau[:, None], Q, UPCAST)
    if UPCAST:
        q = q.to(tl.float32)
        grad = grad.to(tl.float32)
    if MASK != "none":
        Mask += b * stride_mb + h * stride_mh
    if PENALTY:
        Penalty += b * stride_pb
    slope = 0.0
    if ALIBI:
        slope = tl.load(Slopes + h).to(tl.float32)
    if DESCRIPTORS:
        keys = tl.make_tensor_descriptor(K, [S, D], [stride_kn, 1], [BLOCK_N, PAD_D])
        values = tl.make_tensor_descriptor(V, [S, DV], [stride_vn, 1], [BLOCK_N, PAD_DV])
        if PENALTY:
            penalties = tl.make_tensor_descriptor(Penalty, [L, S], [stride_pm, 1], [BLOCK_M, BLOCK_N])

    # Keys [low, high) are seen by some row of the block, [all_low, all_high) by every row.
    low = 0
    high = S
    all_low = 0
    all_high = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.minimum(S, tl.maximum(0, first_row + BLOCK_M + offset))
        all_high = tl.minimum(all_high, tl.maximum(0, first_row + offset + 1) // BLOCK_N * BLOCK_N)
    if WINDOW:
        low = tl.maximum(0, first_row + offset - window + 1) // BLOCK_N * BLOCK_N
        all_low = tl.cdiv(tl.maximum(0, first_row + BLOCK_M + offset - window), BLOCK_N) * BLOCK_N
        all_low = tl.minimum(all_low, tl.maximum(low, tl.cdiv(high, BLOCK_N) * BLOCK_N))
        all_high = tl.maximum(all_low, all_high)

    dq = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    by_slope = tl.zeros([BLOCK_M], tl.float32)
    for PART in tl.static_range(3):
        if PART == 1 or PART == 2 or WINDOW:
            if PART == 0:  # the edge of the window
                start = low
                stop = all_low
            elif PART == 1 and SKIPS:
                Live += (b * blocks + block) * tl.cdiv(S, BLOCK_N)
                start = 0
                stop = tl.load(Lives + b * blocks + block)
            elif PART == 1:  # no position hides anything
                start = all_low
                stop = all_high
            else:  # the diagonal, and the end of the sequence
                start = all_high
                stop = high
            for at in tl.range(start, stop, 1 if PART == 1 and SKIPS else BLOCK_N):
                first = at
                if PART == 1 and SKIPS:
                    first = tl.load(Live + at) * BLOCK_N
                cols = first + n
                j = cols[None, :]
                if DESCRIPTORS:
                    k = keys.load([first, 0])
                    v = values.load([first, 0])
                else:
                    place = tl.cast(first, tl.int64)
                    K_tile = K + place * stride_kn
                    V_tile = V + place * stride_vn
                    k = tile(K_tile, n[:, None], d[None, :], stride_kn, stride_kd, S - first, PART != 1, D, PAD_D)
                    v = tile(V_tile, n[:, None], dv[None, :], stride_vn, stride_vd, S - first, PART != 1, DV, PAD_DV)
                if UPCAST:
                    k = k.to(tl.float32)
                    v = v.to(tl.float32)
                product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                s = product
                if PENALTY and DESCRIPTORS:
                    taken = penalties.load([first_row, first])
                elif PENALTY:
                    taken = tl.load(Penalty + i.to(tl.int64) * stride_pm + j, mask=(i < L) & (j < S), other=0.0)
                else:
                    taken = 0.0
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
                    Mask,
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
                p = tl.exp2(s - lse[:, None]) if ADDED else tl.exp2(s * (scale * LOG2E) - lse[:, None])
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                if DROPOUT:
                    alive = survives(i, j, bh, Seed, threshold)
                    dp = tl.where(alive, dp * kept, 0.0)
                if TEMPERATURES:  # weights rounded as they were when they met the values: delta is made of those
                    rho = tl.load(ValueTau + (b * (H // GROUP) + hk) * S + cols, mask=cols < S, other=0.0)
                    used = p * rho.to(tl.float32)[None, :]
                    used = narrow(used, V, UPCAST)
                    ds = used.to(tl.float32) * dp - p * delta[:, None]
                else:
                    ds = p * (dp - delta[:, None])
                if BIAS_GRADIENT:
                    tl.store(DBias + (row_of + i) * S + j, ds, mask=(i < L) & (j < S))
                if SLOPE_GRADIENT:
                    far = apart(i, j, offset, CAUSAL)
                    by_slope -= tl.sum(ds * far, 1)
                if SOFTCAP:
                    t = bent(product, scale, softcap)
                    ds = ds * (1 - t * t)
                ds = narrow(ds, K, UPCAST)
                dq += tl.dot(ds, k, input_precision=PRECISION)

    if SLOPE_GRADIENT:
        tl.store(DSlopes + row_of + rows, by_slope, mask=rows < L)
    dq = dq * scale
    warm = dq
    if TEMPERATURES:
        warm = dq * tau[:, None]
    warm = narrow(warm, DQuery, UPCAST)
    tl.store(DQuery + (row_of + i) * D + d[None, :], warm, mask=(i < L) & (d[None, :] < D))
    if TEMPERATURES:
        # Loaded in another way than before the loop: else the compiler keeps them in registers all the time.
        places = m[:, None].to(tl.int64) * stride_qm + d[None, :] * stride_qd
        bare = tl.load(Q + places, (i < L) & (d[None, :] < D), 0.0, eviction_policy="evict_first")
        tl.store(DQueryTau + row_of + rows, tl.sum(dq * bare.to(tl.float32), 1), mask=rows < L)
