"""Backward pass of bidirectional attention whose queries are its keys: one program per block, as query and as key."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, narrow, tile


@triton.jit
def attention_backward_shared(
    Q,  # [B, H, L, D], queries and keys
    V,  # [B, H, L, Dv]
    DOut,  # [B, H, L, Dv]
    Lse,  # [B, H, L], in base 2
    Delta,  # [B, H, L], sum of out * dout over features
    DQuery,  # [B, H, L, D], written: the gradient as query and as key
    DValue,  # [B, H, L, Dv], written
    Mask,  # [B, H, L, L] of one row for all queries, any stride may be 0
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
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
    stride_mn,
    H,
    L,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,  # powers of two, 16 at least
    PAD_DV: tl.constexpr,
    MASK: tl.constexpr,  # "none" or "keys"
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the gradients. A tile of scores serves twice: rows as queries of the columns, and as their keys.

    That makes 5 products of tiles, where a program by queries and one by keys make 7.
    """
    blocks = tl.cdiv(L, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    first_row = tl.program_id(0) % blocks * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_D)
    dv = tl.arange(0, PAD_DV)
    rows = first_row + m
    row_of = bh.to(tl.int64) * L
    Q += b * stride_qb + h * stride_qh
    V += b * stride_vb + h * stride_vh
    DOut += b * stride_gb + h * stride_gh
    place = first_row.to(tl.int64)
    left = L - first_row
    r = tile(Q + place * stride_qm, m[:, None], d[None, :], stride_qm, stride_qd, left, True, D, PAD_D)
    v = tile(V + place * stride_vn, m[:, None], dv[None, :], stride_vn, stride_vd, left, True, DV, PAD_DV)
    grad = tile(DOut + place * stride_gm, m[:, None], dv[None, :], stride_gm, stride_gd, left, True, DV, PAD_DV)
    lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees no key
    delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
    if UPCAST:
        r = r.to(tl.float32)
        v = v.to(tl.float32)
        grad = grad.to(tl.float32)
    if MASK == "keys":
        Mask += b * stride_mb + h * stride_mh
        seen = tl.load(Mask + rows * stride_mn, mask=rows < L, other=0) != 0

    dr = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    dvalue = tl.zeros([BLOCK_M, PAD_DV], tl.float32)
    for first in tl.range(0, L, BLOCK_N):
        cols = first + n
        at = tl.cast(first, tl.int64)
        behind = L - first
        r_other = tile(Q + at * stride_qm, n[:, None], d[None, :], stride_qm, stride_qd, behind, True, D, PAD_D)
        v_other = tile(V + at * stride_vn, n[:, None], dv[None, :], stride_vn, stride_vd, behind, True, DV, PAD_DV)
        g_other = tile(DOut + at * stride_gm, n[:, None], dv[None, :], stride_gm, stride_gd, behind, True, DV, PAD_DV)
        lse_other = tl.load(Lse + row_of + cols, mask=cols < L, other=float("inf"))
        lse_other = tl.where(lse_other == float("-inf"), float("inf"), lse_other)
        delta_other = tl.load(Delta + row_of + cols, mask=cols < L, other=0.0)
        if UPCAST:
            r_other = r_other.to(tl.float32)
            v_other = v_other.to(tl.float32)
            g_other = g_other.to(tl.float32)
        s = tl.dot(r, tl.trans(r_other), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.where(cols[None, :] < L, tl.exp2(s - lse[:, None]), 0.0)  # the rows as queries
        q = tl.where(rows[:, None] < L, tl.exp2(s - lse_other[None, :]), 0.0)  # the rows as keys
        if MASK == "keys":
            seen_other = tl.load(Mask + cols * stride_mn, mask=cols < L, other=0) != 0
            p = tl.where(seen_other[None, :], p, 0.0)
            q = tl.where(seen[:, None], q, 0.0)
        dp = tl.dot(grad, tl.trans(v_other), input_precision=PRECISION)
        dq = tl.dot(v, tl.trans(g_other), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) + q * (dq - delta_other[None, :])
        q = narrow(q, V, UPCAST)
        ds = narrow(ds, Q, UPCAST)
        dvalue += tl.dot(q, g_other, input_precision=PRECISION)
        dr += tl.dot(ds, r_other, input_precision=PRECISION)

    out = (row_of + rows)[:, None]
    dr = narrow(dr * scale, DQuery, UPCAST)
    tl.store(DQuery + out * D + d[None, :], dr, mask=(rows[:, None] < L) & (d[None, :] < D))
    dvalue = narrow(dvalue, DValue, UPCAST)
    tl.store(DValue + out * DV + dv[None, :], dvalue, mask=(rows[:, None] < L) & (dv[None, :] < DV))
