"""attention_forward, specialised by attnrewrite from its template forward.py.

ALIBI = False, CAUSAL = True, D = 128, DROPOUT = False, DV = 128, GROUP = 1, MASK = 'none', PAD_D = 128, PAD_DV = 128,
PAIR = False, PENALTY = True, PRECISION = 'ieee', SINKS = False, SKIPS = False, SOFTCAP = False, TEMPERATURES = False,
UPCAST = False, WINDOW = True

Digest 49c97e60ad8891bc59dbc088d25e8dff1a0c48b1f3e61c8225e8edb36f728f16.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_forward(
    Q,  # [B, H, L, D]
    K,  # [B, Hkv, S, D]
    V,  # [B, Hkv, S, Dv]
    Out,  # [B, H, L, Dv]
    Lse,  # [B, H, L], in base 2
    Penalty,  # [B, L, S], times log2(e)
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
    stride_ob,
    stride_oh,
    stride_om,
    stride_pb,
    stride_pm,
    B,
    H,
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    window,
    scale,
    DESCRIPTORS: tl.constexpr,  # whether tiles come by the TMA unit
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write out = softmax(logits) v and the log-sum-exp of each row."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(L, BLOCK_M)
    # Heads side by side: they share a tile of the penalty, which then comes from the L2 cache.
    bh = pid % (B * H)
    block = pid // (B * H)
    block = blocks - 1 - block  # the rows that see most keys start first
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    hk = h // 1
    first_row = block * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, 128)
    dv = tl.arange(0, 128)
    rows = first_row + m
    i = rows[:, None]
    Q += b * stride_qb + h * stride_qh + first_row.to(tl.int64) * stride_qm
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    q = tl.load(Q + m[:, None] * stride_qm + d[None, :] * stride_qd, mask=m[:, None] < L - first_row, other=0.0)
    Penalty += b * stride_pb
    if DESCRIPTORS:
        keys = tl.make_tensor_descriptor(K, [S, 128], [stride_kn, 1], [BLOCK_N, 128])
        values = tl.make_tensor_descriptor(V, [S, 128], [stride_vn, 1], [BLOCK_N, 128])
        penalties = tl.make_tensor_descriptor(Penalty, [L, S], [stride_pm, 1], [BLOCK_M, BLOCK_N])

    # Keys [low, high) are seen by some row of the block, [all_low, all_high) by every row.
    low = 0
    high = S
    all_low = 0
    all_high = S // BLOCK_N * BLOCK_N
    high = tl.minimum(S, tl.maximum(0, first_row + BLOCK_M + offset))
    all_high = tl.minimum(all_high, tl.maximum(0, first_row + offset + 1) // BLOCK_N * BLOCK_N)
    low = tl.maximum(0, first_row + offset - window + 1) // BLOCK_N * BLOCK_N
    all_low = tl.cdiv(tl.maximum(0, first_row + BLOCK_M + offset - window), BLOCK_N) * BLOCK_N
    all_low = tl.minimum(all_low, tl.maximum(low, tl.cdiv(high, BLOCK_N) * BLOCK_N))
    all_high = tl.maximum(all_low, all_high)

    best = tl.full([BLOCK_M], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 128], tl.float32)
    start = low
    stop = all_low
    for at in tl.range(start, stop, BLOCK_N):
        first = at
        cols = first + n
        j = cols[None, :]
        if DESCRIPTORS:
            k = keys.load([first, 0])
            v = values.load([first, 0])
        else:
            place = tl.cast(first, tl.int64)
            K_tile = K + place * stride_kn
            V_tile = V + place * stride_vn
            k = tl.load(
                K_tile + n[:, None] * stride_kn + d[None, :] * stride_kd,
                mask=n[:, None] < S - first,
                other=0.0,
            )
            v = tl.load(
                V_tile + n[:, None] * stride_vn + dv[None, :] * stride_vd,
                mask=n[:, None] < S - first,
                other=0.0,
            )
        s = tl.dot(q, tl.trans(k), input_precision='ieee')
        if DESCRIPTORS:
            taken = penalties.load([first_row, first])
        else:
            taken = tl.load(Penalty + i.to(tl.int64) * stride_pm + j, mask=(i < L) & (j < S), other=0.0)
        s = s * (scale * LOG2E)
        s -= taken.to(tl.float32)
        s = tl.where(j < S, s, float('-inf'))
        s = tl.where(j <= i + offset, s, float('-inf'))
        s = tl.where(j > i + offset - window, s, float('-inf'))
        higher = tl.maximum(best, tl.max(s, 1))
        shift = tl.where(higher == float('-inf'), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None]
        p = p.to(V.dtype.element_ty)
        acc = tl.dot(p, v, acc, input_precision='ieee')
        best = higher
    start = all_low
    stop = all_high
    for at in tl.range(start, stop, BLOCK_N):
        first = at
        cols = first + n
        j = cols[None, :]
        if DESCRIPTORS:
            k = keys.load([first, 0])
            v = values.load([first, 0])
        else:
            place = tl.cast(first, tl.int64)
            K_tile = K + place * stride_kn
            V_tile = V + place * stride_vn
            k = tl.load(K_tile + n[:, None] * stride_kn + d[None, :] * stride_kd)
            v = tl.load(V_tile + n[:, None] * stride_vn + dv[None, :] * stride_vd)
        s = tl.dot(q, tl.trans(k), input_precision='ieee')
        if DESCRIPTORS:
            taken = penalties.load([first_row, first])
        else:
            taken = tl.load(Penalty + i.to(tl.int64) * stride_pm + j, mask=(i < L) & (j < S), other=0.0)
        s = s * (scale * LOG2E)
        s -= taken.to(tl.float32)
        higher = tl.maximum(best, tl.max(s, 1))
        shift = tl.where(higher == float('-inf'), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None]
        p = p.to(V.dtype.element_ty)
        acc = tl.dot(p, v, acc, input_precision='ieee')
        best = higher
    start = all_high
    stop = high
    for at in tl.range(start, stop, BLOCK_N):
        first = at
        cols = first + n
        j = cols[None, :]
        if DESCRIPTORS:
            k = keys.load([first, 0])
            v = values.load([first, 0])
        else:
            place = tl.cast(first, tl.int64)
            K_tile = K + place * stride_kn
            V_tile = V + place * stride_vn
            k = tl.load(
                K_tile + n[:, None] * stride_kn + d[None, :] * stride_kd,
                mask=n[:, None] < S - first,
                other=0.0,
            )
            v = tl.load(
                V_tile + n[:, None] * stride_vn + dv[None, :] * stride_vd,
                mask=n[:, None] < S - first,
                other=0.0,
            )
        s = tl.dot(q, tl.trans(k), input_precision='ieee')
        if DESCRIPTORS:
            taken = penalties.load([first_row, first])
        else:
            taken = tl.load(Penalty + i.to(tl.int64) * stride_pm + j, mask=(i < L) & (j < S), other=0.0)
        s = s * (scale * LOG2E)
        s -= taken.to(tl.float32)
        s = tl.where(j < S, s, float('-inf'))
        s = tl.where(j <= i + offset, s, float('-inf'))
        s = tl.where(j > i + offset - window, s, float('-inf'))
        higher = tl.maximum(best, tl.max(s, 1))
        shift = tl.where(higher == float('-inf'), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None]
        p = p.to(V.dtype.element_ty)
        acc = tl.dot(p, v, acc, input_precision='ieee')
        best = higher

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    acc = acc.to(Out.dtype.element_ty)
    Out += b * stride_ob + h * stride_oh + first_row.to(tl.int64) * stride_om
    tl.store(Out + m[:, None] * stride_om + dv[None, :], acc, mask=(i < L) & (dv[None, :] < 128))
    tl.store(Lse + bh.to(tl.int64) * L + rows, best + tl.log2(total), mask=rows < L)
