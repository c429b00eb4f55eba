"""attention_forward, specialised by attnrewrite from its template forward.py.

ALIBI = False, CAUSAL = False, D = 64, DROPOUT = False, DV = 64, GROUP = 4, MASK = 'keys', PAD_D = 64, PAD_DV = 64, PAIR
= False, PENALTY = False, PRECISION = 'ieee', SINKS = False, SKIPS = False, SOFTCAP = False, TEMPERATURES = True, UPCAST
= False, WINDOW = False

Digest aa65e08e971bf4d69f7a877f376a3ddc094d54837b7aa135d38968b8386e2b0a.
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
    QueryTau,  # [B, H, L]
    ValueTau,  # [B, Hkv, S]
    Mask,  # [B, H, L, S], any stride may be 0
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
    stride_mb,
    stride_mh,
    stride_mn,
    H,
    L,
    S,
    scale,
    DESCRIPTORS: tl.constexpr,  # whether tiles come by the TMA unit
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write out = softmax(logits) v and the log-sum-exp of each row."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(L, BLOCK_M)
    bh = pid // blocks
    block = pid % blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    hk = h // 4
    first_row = block * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, 64)
    dv = tl.arange(0, 64)
    rows = first_row + m
    i = rows[:, None]
    Q += b * stride_qb + h * stride_qh + first_row.to(tl.int64) * stride_qm
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    q = tl.load(Q + m[:, None] * stride_qm + d[None, :] * stride_qd, mask=m[:, None] < L - first_row, other=0.0)
    tau = tl.load(QueryTau + bh.to(tl.int64) * L + rows, mask=rows < L, other=0.0).to(tl.float32)
    x = q.to(tl.float32) * tau[:, None]
    x = x.to(Q.dtype.element_ty)
    q = x
    Mask += b * stride_mb + h * stride_mh
    if DESCRIPTORS:
        keys = tl.make_tensor_descriptor(K, [S, 64], [stride_kn, 1], [BLOCK_N, 64])
        values = tl.make_tensor_descriptor(V, [S, 64], [stride_vn, 1], [BLOCK_N, 64])
    high = S
    all_low = 0
    all_high = S // BLOCK_N * BLOCK_N

    best = tl.full([BLOCK_M], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 64], tl.float32)
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
        seen = tl.load(Mask + j * stride_mn, mask=j < S, other=0)
        s = tl.where(seen != 0, s, float('-inf'))
        higher = tl.maximum(best, tl.max(s, 1) * (scale * LOG2E))
        shift = tl.where(higher == float('-inf'), 0.0, higher)
        p = tl.exp2(s * (scale * LOG2E) - shift[:, None])
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None]
        rho = tl.load(ValueTau + (b * (H // 4) + hk) * S + cols, mask=cols < S, other=0.0)
        p = p * rho.to(tl.float32)[None, :]
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
        seen = tl.load(Mask + j * stride_mn, mask=j < S, other=0)
        s = tl.where(seen != 0, s, float('-inf'))
        s = tl.where(j < S, s, float('-inf'))
        higher = tl.maximum(best, tl.max(s, 1) * (scale * LOG2E))
        shift = tl.where(higher == float('-inf'), 0.0, higher)
        p = tl.exp2(s * (scale * LOG2E) - shift[:, None])
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None]
        rho = tl.load(ValueTau + (b * (H // 4) + hk) * S + cols, mask=cols < S, other=0.0)
        p = p * rho.to(tl.float32)[None, :]
        p = p.to(V.dtype.element_ty)
        acc = tl.dot(p, v, acc, input_precision='ieee')
        best = higher

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    acc = acc.to(Out.dtype.element_ty)
    Out += b * stride_ob + h * stride_oh + first_row.to(tl.int64) * stride_om
    tl.store(Out + m[:, None] * stride_om + dv[None, :], acc, mask=(i < L) & (dv[None, :] < 64))
    tl.store(Lse + bh.to(tl.int64) * L + rows, best + tl.log2(total), mask=rows < L)
