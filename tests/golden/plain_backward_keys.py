"""attention_backward_keys, specialised by attnrewrite from its template backward_keys.py.

ALIBI = False, CAUSAL = False, D = 80, DROPOUT = False, DV = 80, GRADIENTS = 'both', GROUP = 1, MASK = 'none', PAD_D =
128, PAD_DV = 128, PENALTY = False, PRECISION = 'ieee', SKIPS = False, SOFTCAP = False, TEMPERATURES = False, UPCAST =
False, WINDOW = False

Digest a1433867be30e662b0a3ccd8d5494d61d4b7586ce261b42e59ac3836163256a0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
    scale,
    DESCRIPTORS: tl.constexpr,  # whether tiles come by the TMA unit
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dk, dv and the gradient by the value temperatures. Tiles stand keys by queries."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_N)
    heads = H // 1
    bh = pid // blocks
    block = pid % blocks
    b = (bh // heads).to(tl.int64)
    hk = (bh % heads).to(tl.int64)
    first = block * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, 128)
    dv = tl.arange(0, 128)
    cols = first + n
    j = cols[:, None]
    K += b * stride_kb + hk * stride_kh + first.to(tl.int64) * stride_kn
    V += b * stride_vb + hk * stride_vh + first.to(tl.int64) * stride_vn
    k = tl.load(
        K + n[:, None] * stride_kn + d[None, :] * stride_kd,
        mask=(n[:, None] < S - first) & (d[None, :] < 80),
        other=0.0,
    )
    v = tl.load(
        V + n[:, None] * stride_vn + dv[None, :] * stride_vd,
        mask=(n[:, None] < S - first) & (dv[None, :] < 80),
        other=0.0,
    )
    if DESCRIPTORS:
        queries = tl.make_tensor_descriptor(Q + b * stride_qb, [H, L, 80], [stride_qh, stride_qm, 1], [1, BLOCK_M, 128])
        gradients = tl.make_tensor_descriptor(
            DOut + b * stride_gb,
            [H, L, 80],
            [stride_gh, stride_gm, 1],
            [1, BLOCK_M, 128],
        )

    # Rows [low, high) see some key of the block, [all_low, all_high) every key.
    low = 0
    high = L
    all_low = 0
    all_high = L // BLOCK_M * BLOCK_M
    all_low = tl.minimum(all_low, tl.maximum(low, tl.cdiv(high, BLOCK_M) * BLOCK_M))
    all_high = tl.maximum(all_low, all_high)

    dk = tl.zeros([BLOCK_N, 128], tl.float32)
    dvalue = tl.zeros([BLOCK_N, 128], tl.float32)
    start = all_low
    stop = all_high
    # Rows of all heads of the group in one loop: with a loop for each, registers would hold keys and values.
    for step in tl.range(0, tl.cdiv(stop - start, BLOCK_M) * 1):
        first_row = start + step // 1 * BLOCK_M
        h = hk * 1 + step % 1
        row_of = (b * H + h) * L
        rows = first_row + m
        if DESCRIPTORS:
            q = queries.load([h.to(tl.int32), first_row, 0]).reshape(BLOCK_M, 128)
            grad = gradients.load([h.to(tl.int32), first_row, 0]).reshape(BLOCK_M, 128)
        else:
            place = tl.cast(first_row, tl.int64)
            Q_tile = Q + b * stride_qb + h * stride_qh + place * stride_qm
            G_tile = DOut + b * stride_gb + h * stride_gh + place * stride_gm
            left = L - first_row
            q = tl.load(Q_tile + m[:, None] * stride_qm + d[None, :] * stride_qd, mask=d[None, :] < 80, other=0.0)
            grad = tl.load(G_tile + m[:, None] * stride_gm + dv[None, :] * stride_gd, mask=dv[None, :] < 80, other=0.0)
        lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float('inf'))
        lse = tl.where(lse == float('-inf'), float('inf'), lse)  # a row that sees no key
        delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
        product = tl.dot(k, tl.trans(q), input_precision='ieee')
        s = product
        p = tl.exp2(s * (scale * LOG2E) - lse[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision='ieee')
        ds = p * (dp - delta[None, :])
        ds = ds.to(Q.dtype.element_ty)
        p = p.to(V.dtype.element_ty)
        dvalue += tl.dot(p, grad, input_precision='ieee')
        dk += tl.dot(ds, q, input_precision='ieee')
    start = all_high
    stop = high
    # Rows of all heads of the group in one loop: with a loop for each, registers would hold keys and values.
    for step in tl.range(0, tl.cdiv(stop - start, BLOCK_M) * 1):
        first_row = start + step // 1 * BLOCK_M
        h = hk * 1 + step % 1
        row_of = (b * H + h) * L
        rows = first_row + m
        if DESCRIPTORS:
            q = queries.load([h.to(tl.int32), first_row, 0]).reshape(BLOCK_M, 128)
            grad = gradients.load([h.to(tl.int32), first_row, 0]).reshape(BLOCK_M, 128)
        else:
            place = tl.cast(first_row, tl.int64)
            Q_tile = Q + b * stride_qb + h * stride_qh + place * stride_qm
            G_tile = DOut + b * stride_gb + h * stride_gh + place * stride_gm
            left = L - first_row
            q = tl.load(
                Q_tile + m[:, None] * stride_qm + d[None, :] * stride_qd,
                mask=(m[:, None] < left) & (d[None, :] < 80),
                other=0.0,
            )
            grad = tl.load(
                G_tile + m[:, None] * stride_gm + dv[None, :] * stride_gd,
                mask=(m[:, None] < left) & (dv[None, :] < 80),
                other=0.0,
            )
        lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float('inf'))
        lse = tl.where(lse == float('-inf'), float('inf'), lse)  # a row that sees no key
        delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
        product = tl.dot(k, tl.trans(q), input_precision='ieee')
        s = product
        s = tl.where(j < S, s, float('-inf'))
        p = tl.exp2(s * (scale * LOG2E) - lse[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision='ieee')
        ds = p * (dp - delta[None, :])
        ds = ds.to(Q.dtype.element_ty)
        p = p.to(V.dtype.element_ty)
        dvalue += tl.dot(p, grad, input_precision='ieee')
        dk += tl.dot(ds, q, input_precision='ieee')

    n_global = (bh.to(tl.int64) * S + cols)[:, None]
    scaled = dvalue
    scaled = scaled.to(DValue.dtype.element_ty)
    tl.store(DValue + n_global * 80 + dv[None, :], scaled, mask=(j < S) & (dv[None, :] < 80))
    x = dk * scale
    x = x.to(DKey.dtype.element_ty)
    dk = x
    tl.store(DKey + n_global * 80 + d[None, :], dk, mask=(j < S) & (d[None, :] < 80))
