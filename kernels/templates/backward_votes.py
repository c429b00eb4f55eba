"""Backward pass of the votes of selective attention: from the gradient by all heads' logits to the voters."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, apart, bent, narrow, scored, tile


@triton.jit
def selective_backward_votes(
    Q,  # [B, L, D], of the selection head, or of a selector
    K,  # [B, S, D]
    DLogits,  # [B, L, S], gradient by the logits, summed over heads
    DVotes,  # [B, L, S], written: gradient by q . k of the votes; may be the memory of DLogits
    Earlier,  # [B, S], votes that the keys have received before the first of these queries
    Later,  # [B, S], gradient by the votes that the keys have received after the last query
    Position,  # of the first query among the keys, one int64
    DBias,  # [B, L, S], to which the gradient by the logits of the votes is added
    DEarlier,  # [B, S], written: gradient by the votes that they had received before the first
    DSelected,  # [B, S, D], written: what the votes add to the gradient of the keys
    DStrength,  # [B, S], written: the gradient by the strength, key by key
    DSlopes,  # [B, S], written: the gradient by the slope of the selection head, key by key
    Mask,  # [B, L, S], any stride may be 0
    Strength,  # of the penalty, one number
    Protected,  # [B, S], keys on which nobody may vote
    Slopes,  # of the selection head, one number
    stride_qb,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kd,
    stride_pb,  # of dlogits and dvotes
    stride_pm,
    stride_cb,  # of protected
    stride_mb,
    stride_mm,
    stride_mn,
    stride_ab,  # of dbias
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    window,
    scale,
    softcap,
    D: tl.constexpr,
    PAD_D: tl.constexpr,  # a power of two, 16 at least
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PLACED: tl.constexpr,  # whether the position is what offset would be
    BIAS_GRADIENT: tl.constexpr,
    SLOPE_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walk up one block of keys, from the last rows to the first, as every vote acts on all later rows.

    F is the sum of votes, so the gradient by the strength needs no F: each vote times what it acts on.
    """
    ADDED: tl.constexpr = SOFTCAP or ALIBI or MASK == "bias"
    blocks = tl.cdiv(S, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_D)
    cols = first + n
    j = cols[None, :]
    Q += b * stride_qb
    K += b * stride_kb + tl.cast(first, tl.int64) * stride_kn
    k = tile(K, n[:, None], d[None, :], stride_kn, stride_kd, S - first, True, D, PAD_D)
    if UPCAST:
        k = k.to(tl.float32)
    DLogits += b * stride_pb
    DVotes += b * stride_pb
    if MASK != "none":
        Mask += b * stride_mb
    if BIAS_GRADIENT:
        DBias += b * stride_ab
    slope = 0.0
    if ALIBI:
        slope = tl.load(Slopes).to(tl.float32)
    strength = tl.load(Strength).to(tl.float32)
    free = tl.load(Protected + b * stride_cb + cols, mask=cols < S, other=1) == 0
    after = (m[:, None] < m[None, :]).to(tl.float32)  # strictly later rows

    low = 0
    high = L
    if CAUSAL:
        low = tl.maximum(0, first - offset) // BLOCK_M * BLOCK_M
    if WINDOW:
        high = tl.minimum(L, tl.maximum(0, first + BLOCK_N - 1 + window - offset))
    if PLACED:
        offset = tl.load(Position).to(tl.int32)
    steps = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
    later = tl.load(Later + b * S + cols, mask=cols < S, other=0.0)
    below = tl.zeros([BLOCK_N], tl.float32)  # gradients by the logits, summed over the rows below
    by_strength = tl.zeros([BLOCK_N], tl.float32)
    by_slope = tl.zeros([BLOCK_N], tl.float32)
    dk = tl.zeros([BLOCK_N, PAD_D], tl.float32)
    for step in tl.range(0, steps):
        first_row = low + (steps - 1 - step) * BLOCK_M
        rows = first_row + m
        i = rows[:, None]
        inside = (i < L) & (j < S)
        pair = i.to(tl.int64) * stride_pm + j
        total = tl.load(DLogits + pair, mask=inside, other=0.0).to(tl.float32)
        acted = below[None, :] + tl.dot(after, total, input_precision=SUM_PRECISION)
        below += tl.sum(total, 0)

        # The vote itself once more, to see whether it was cast.
        Q_tile = Q + tl.cast(first_row, tl.int64) * stride_qm
        q = tile(Q_tile, m[:, None], d[None, :], stride_qm, stride_qd, L - first_row, True, D, PAD_D)
        if UPCAST:
            q = q.to(tl.float32)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        z = product
        z = scored(
            z,
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
            0.0,
            True,
            CAUSAL,
            WINDOW,
            MASK,
            SOFTCAP,
            ALIBI,
            False,
        )
        z = z / LOG2E if ADDED else z * scale
        cast = (i + offset != j) & (i < L) & free[None, :] & (z > 0.0)
        by_strength -= tl.sum(tl.where(cast & (acted != 0.0), z * acted, 0.0), 0)
        dz = tl.where(cast, later[None, :] - strength * acted, 0.0)
        if BIAS_GRADIENT:
            at = i.to(tl.int64) * S + j
            tl.store(DBias + at, tl.load(DBias + at, mask=inside, other=0.0) + dz, mask=inside)
        if SLOPE_GRADIENT:
            far = apart(i, j, offset, CAUSAL)
            by_slope -= tl.sum(dz * far, 0)
        dz = dz * scale
        if SOFTCAP:
            t = bent(product, scale, softcap)
            dz = dz * (1 - t * t)
        dz = narrow(dz, DVotes, UPCAST)
        tl.store(DVotes + pair, dz, mask=inside)
        dk += tl.dot(tl.trans(dz), q, input_precision=PRECISION)

    if SLOPE_GRADIENT:
        tl.store(DSlopes + b * S + cols, by_slope, mask=cols < S)
    column = (b * S + cols)[:, None]
    tl.store(DSelected + column * D + d[None, :], dk, mask=(cols[:, None] < S) & (d[None, :] < D))
    tl.store(DEarlier + b * S + cols, later - strength * below, mask=cols < S)
    received = tl.load(Earlier + b * S + cols, mask=cols < S, other=0.0)
    by_strength -= tl.where(below == 0.0, 0.0, received * below)  # infinite where a key was evicted
    tl.store(DStrength + b * S + cols, by_strength, mask=cols < S)
