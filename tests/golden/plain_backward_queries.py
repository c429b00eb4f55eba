"""attention_backward_queries, specialised by attnrewrite from its template backward_queries.py.

ALIBI = False, BIAS_GRADIENT = False, CAUSAL = True, D = 64, DROPOUT = True, DV = 64, GROUP = 1, MASK = 'none', PAD_D =
64, PAD_DV = 64, PENALTY = False, PRECISION = 'ieee', SKIPS = False, SLOPE_GRADIENT = False, SOFTCAP = True,
TEMPERATURES = False, UPCAST = False, WINDOW = False

Digest 8a4bc647d2de154a64874b0b16db4bfa672df2c3985c3ebe04a2fa04ea9780c5.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_backward_queries(
    Q,  # [B, H, L, D]
    K,  # [B, Hkv, S, D]
    V,  # [B, Hkv, S, Dv]
    DOut,  # [B, H, L, Dv]
    Lse,  # [B, H, L], in base 2
    Delta,  # [B, H, L], sum of out * dout over features
    DQuery,  # [B, H, L, D]
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
    H,
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    scale,
    softcap,
    threshold,  # of dropout: p * 2**32
    kept,  # of dropout: 1 / (1 - p)
    DESCRIPTORS: tl.constexpr,  # whether tiles come by the TMA unit
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dq, and the gradients by the query temperatures, the bias and the slopes."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(L, BLOCK_M)
    bh = pid // blocks
    block = pid % blocks
    block = blocks - 1 - block  # the rows that see most keys start first
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    hk = h // 1
    first_row = block * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, 64)
    dv = tl.arange(0, 64)
    rows = first_row + m
    i = rows[:, None]
    row_of = bh.to(tl.int64) * L
    Q += b * stride_qb + h * stride_qh + first_row.to(tl.int64) * stride_qm
    DOut += b * stride_gb + h * stride_gh + first_row.to(tl.int64) * stride_gm
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    q = tl.load(Q + m[:, None] * stride_qm + d[None, :] * stride_qd, mask=m[:, None] < L - first_row, other=0.0)
    grad = tl.load(DOut + m[:, None] * stride_gm + dv[None, :] * stride_gd, mask=m[:, None] < L - first_row, other=0.0)
    lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float('inf'))
    lse = tl.where(lse == float('-inf'), float('inf'), lse)  # a row that sees no key
    delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
    if DESCRIPTORS:
        keys = tl.make_tensor_descriptor(K, [S, 64], [stride_kn, 1], [BLOCK_N, 64])
        values = tl.make_tensor_descriptor(V, [S, 64], [stride_vn, 1], [BLOCK_N, 64])
    high = S
    all_low = 0
    all_high = S // BLOCK_N * BLOCK_N
    high = tl.minimum(S, tl.maximum(0, first_row + BLOCK_M + offset))
    all_high = tl.minimum(all_high, tl.maximum(0, first_row + offset + 1) // BLOCK_N * BLOCK_N)

    dq = tl.zeros([BLOCK_M, 64], tl.float32)
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
        product = tl.dot(q, tl.trans(k), input_precision='ieee')
        s = product
        power = tl.exp2(s * (scale / softcap * (2 * LOG2E)))
        s = 1 - 2 / (power + 1)
        s = s * (softcap * LOG2E)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision='ieee')
        seed = tl.load(Seed)
        drawn, _, _, _ = tl.philox(seed, (i + j * 0).to(tl.uint32), (j + i * 0).to(tl.uint32), bh, 0)
        alive = drawn >= threshold
        dp = tl.where(alive, dp * kept, 0.0)
        ds = p * (dp - delta[:, None])
        power = tl.exp2(product * (scale / softcap * (2 * LOG2E)))
        t = 1 - 2 / (power + 1)
        ds = ds * (1 - t * t)
        ds = ds.to(K.dtype.element_ty)
        dq += tl.dot(ds, k, input_precision='ieee')
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
        product = tl.dot(q, tl.trans(k), input_precision='ieee')
        s = product
        power = tl.exp2(s * (scale / softcap * (2 * LOG2E)))
        s = 1 - 2 / (power + 1)
        s = s * (softcap * LOG2E)
        s = tl.where(j < S, s, float('-inf'))
        s = tl.where(j <= i + offset, s, float('-inf'))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision='ieee')
        seed = tl.load(Seed)
        drawn, _, _, _ = tl.philox(seed, (i + j * 0).to(tl.uint32), (j + i * 0).to(tl.uint32), bh, 0)
        alive = drawn >= threshold
        dp = tl.where(alive, dp * kept, 0.0)
        ds = p * (dp - delta[:, None])
        power = tl.exp2(product * (scale / softcap * (2 * LOG2E)))
        t = 1 - 2 / (power + 1)
        ds = ds * (1 - t * t)
        ds = ds.to(K.dtype.element_ty)
        dq += tl.dot(ds, k, input_precision='ieee')
    dq = dq * scale
    warm = dq
    warm = warm.to(DQuery.dtype.element_ty)
    tl.store(DQuery + (row_of + i) * 64 + d[None, :], warm, mask=(i < L) & (d[None, :] < 64))
