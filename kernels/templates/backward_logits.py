"""Backward pass of selective attention: the gradient by the logits, summed over heads; one program per tile."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, narrow, scored, tile


@triton.jit
def selective_backward_logits(
    Q,  # [B, H, L, D]
    K,  # [B, Hkv, S, D]
    V,  # [B, Hkv, S, Dv]
    DOut,  # [B, H, L, Dv]
    Lse,  # [B, H, L], in base 2
    Delta,  # [B, H, L], sum of out * dout over features
    DLogits,  # [B, L, S], written where keys are seen; may be the memory of Penalty
    Death,  # [B, S], the first row from which on a key counts for nothing
    Mask,  # [B, H, L, S], any stride may be 0
    Penalty,  # [B, L, S], times log2(e)
    Slopes,  # [H]
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
    H,
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    window,
    scale,
    softcap,
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
    SKIPS: tl.constexpr,  # whether to leave out what Death says
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the sum over heads of p (dp - delta). The loop goes over heads: a tile of the penalty is read once."""
    ADDED: tl.constexpr = SOFTCAP or ALIBI or MASK == "bias"
    row_blocks = tl.cdiv(L, BLOCK_M)
    block = tl.program_id(0) % row_blocks
    col_block = tl.program_id(0) // row_blocks % tl.cdiv(S, BLOCK_N)
    b = (tl.program_id(0) // (row_blocks * tl.cdiv(S, BLOCK_N))).to(tl.int64)
    first_row = block * BLOCK_M
    first = col_block * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_D)
    dv = tl.arange(0, PAD_DV)
    rows = first_row + m
    cols = first + n
    i = rows[:, None]
    j = cols[None, :]
    down = tl.cast(first_row, tl.int64)
    along = tl.cast(first, tl.int64)
    Q += b * stride_qb + down * stride_qm
    DOut += b * stride_gb + down * stride_gm
    K += b * stride_kb + along * stride_kn
    V += b * stride_vb + along * stride_vn

    heads = H
    if CAUSAL:
        heads = tl.where(first <= first_row + BLOCK_M - 1 + offset, heads, 0)
    if WINDOW:
        heads = tl.where(first + BLOCK_N - 1 > first_row + offset - window, heads, 0)
    visited = heads > 0
    if SKIPS:
        death = tl.load(Death + b * S + cols, mask=cols < S, other=0)
        heads = tl.where(tl.max(death, 0) > first_row, heads, 0)
    inside = (i < L) & (j < S)
    pair = b * stride_pb + i.to(tl.int64) * stride_pm + j
    taken = tl.load(Penalty + pair, mask=inside & visited, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h in tl.range(0, heads):
        hh = tl.cast(h, tl.int64)
        hk = hh // GROUP
        row_of = (b * H + hh) * L
        q = tile(Q + hh * stride_qh, m[:, None], d[None, :], stride_qm, stride_qd, L - first_row, True, D, PAD_D)
        k = tile(K + hk * stride_kh, n[:, None], d[None, :], stride_kn, stride_kd, S - first, True, D, PAD_D)
        lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees no key
        delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        M_head = Mask
        if MASK != "none":
            M_head = Mask + b * stride_mb + hh * stride_mh
        slope = 0.0
        if ALIBI:
            slope = tl.load(Slopes + hh).to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
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
            0.0,
            False,  # what positions hide is left out of the sum
            CAUSAL,
            WINDOW,
            MASK,
            SOFTCAP,
            ALIBI,
            False,
        )
        less = taken.to(tl.float32) + lse[:, None]
        p = tl.exp2(s - less) if ADDED else tl.exp2(s * (scale * LOG2E) - less)
        v = tile(V + hk * stride_vh, n[:, None], dv[None, :], stride_vn, stride_vd, S - first, True, DV, PAD_DV)
        grad = tile(
            DOut + hh * stride_gh, m[:, None], dv[None, :], stride_gm, stride_gd, L - first_row, True, DV, PAD_DV
        )
        if UPCAST:
            v = v.to(tl.float32)
            grad = grad.to(tl.float32)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        total += p * (dp - delta[:, None])

    if CAUSAL:
        total = tl.where(j <= i + offset, total, 0.0)
    if WINDOW:
        total = tl.where(j > i + offset - window, total, 0.0)
    if SKIPS:
        total = tl.where(i < death[None, :], total, 0.0)
    total = narrow(total, DLogits, UPCAST)
    tl.store(DLogits + pair, total, mask=inside & visited)
