"""Backward pass of the votes of selective attention: from gradients by all heads' logits to the selection head."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, bent, narrow, scored, tile


@triton.jit
def selective_backward_votes(
    Q,  # [B, H, L, D]
    K,  # [B, Hkv, S, D]
    V,  # [B, Hkv, S, Dv]
    DOut,  # [B, H, L, Dv]
    Lse,  # [B, H, L], in base 2
    Delta,  # [B, H, L], sum of out * dout over features
    DVotes,  # [B, L, S], written: gradient by the selection head's q . k, times scale; may be the memory of Penalty
    Later,  # [B, S], gradient by the votes that the keys have received after the last query
    Death,  # [B, S], the first row from which on a key counts for nothing
    Position,  # of the first query among the keys, one int64
    DEarlier,  # [B, S], written: gradient by the votes that they had received before the first
    DSelected,  # [B, S, D], written: what the votes add to the gradient of the selection head's keys
    DStrength,  # [B, S], written: the gradient by the strength, key by key
    Mask,  # [B, H, L, S], any stride may be 0
    Penalty,  # [B, L, S], times log2(e)
    Strength,  # of the penalty, one number
    Protected,  # [B, S], keys on which nobody may vote
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
    stride_cb,  # of protected
    H,
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    window,
    scale,
    softcap,
    selection_head,
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,  # powers of two, 16 at least
    PAD_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PLACED: tl.constexpr,  # whether the position is what offset would be
    SKIPS: tl.constexpr,  # whether to leave out what Death says
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walk up one block of keys, from the last rows to the first, as every vote acts on all later rows."""
    ADDED: tl.constexpr = SOFTCAP or ALIBI or MASK == "bias"
    blocks = tl.cdiv(S, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_D)
    dv = tl.arange(0, PAD_DV)
    cols = first + n
    j = cols[None, :]
    place = tl.cast(first, tl.int64)
    Q += b * stride_qb
    K += b * stride_kb + place * stride_kn
    V += b * stride_vb + place * stride_vn
    DOut += b * stride_gb
    Penalty += b * stride_pb
    DVotes += b * stride_pb
    strength = tl.load(Strength).to(tl.float32)
    free = tl.load(Protected + b * stride_cb + cols, mask=cols < S, other=1) == 0
    chosen = tl.cast(selection_head, tl.int64)
    K_chosen = K + chosen // GROUP * stride_kh
    own_k = tile(K_chosen, n[:, None], d[None, :], stride_kn, stride_kd, S - first, True, D, PAD_D)
    if UPCAST:
        own_k = own_k.to(tl.float32)
    after = (m[:, None] < m[None, :]).to(tl.float32)  # strictly later rows

    low = 0
    high = L
    if CAUSAL:
        low = tl.maximum(0, first - offset) // BLOCK_M * BLOCK_M
    if WINDOW:
        high = tl.minimum(L, tl.maximum(0, first + BLOCK_N - 1 + window - offset))
    if PLACED:
        offset = tl.load(Position).to(tl.int32)
    if SKIPS:
        # No row from here on has a weight for these keys, so that votes of such rows have no gradient.
        death = tl.max(tl.load(Death + b * S + cols, mask=cols < S, other=0), 0)
        dead = tl.minimum(high, tl.maximum(low, tl.cdiv(death, BLOCK_M) * BLOCK_M))
        for first_row in tl.range(dead, high, BLOCK_M):
            rows = first_row + m
            i = rows[:, None]
            none = tl.zeros([BLOCK_M, BLOCK_N], DVotes.dtype.element_ty)
            tl.store(DVotes + i.to(tl.int64) * stride_pm + j, none, mask=(i < L) & (j < S))
        high = dead
    steps = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
    later = tl.load(Later + b * S + cols, mask=cols < S, other=0.0)
    below = tl.zeros([BLOCK_N], tl.float32)  # gradients by the logits, summed over heads and the rows below
    by_strength = tl.zeros([BLOCK_N], tl.float32)
    dk = tl.zeros([BLOCK_N, PAD_D], tl.float32)
    for step in tl.range(0, steps):
        first_row = low + (steps - 1 - step) * BLOCK_M
        rows = first_row + m
        i = rows[:, None]
        left = L - first_row
        at = tl.cast(first_row, tl.int64)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for h in tl.range(0, H):
            hh = tl.cast(h, tl.int64)
            row_of = (b * H + hh) * L
            Q_tile = Q + hh * stride_qh + at * stride_qm
            G_tile = DOut + hh * stride_gh + at * stride_gm
            K_tile = K + hh // GROUP * stride_kh
            V_tile = V + hh // GROUP * stride_vh
            q = tile(Q_tile, m[:, None], d[None, :], stride_qm, stride_qd, left, True, D, PAD_D)
            k = tile(K_tile, n[:, None], d[None, :], stride_kn, stride_kd, S - first, True, D, PAD_D)
            v = tile(V_tile, n[:, None], dv[None, :], stride_vn, stride_vd, S - first, True, DV, PAD_DV)
            grad = tile(G_tile, m[:, None], dv[None, :], stride_gm, stride_gd, left, True, DV, PAD_DV)
            lse = tl.load(Lse + row_of + rows, mask=rows < L, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees no key
            delta = tl.load(Delta + row_of + rows, mask=rows < L, other=0.0)
            if UPCAST:
                q = q.to(tl.float32)
                k = k.to(tl.float32)
                v = v.to(tl.float32)
                grad = grad.to(tl.float32)
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
                Penalty,
                stride_pm,
                strength,
                True,
                CAUSAL,
                WINDOW,
                MASK,
                SOFTCAP,
                ALIBI,
                True,
            )
            p = tl.exp2(s - lse[:, None])
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            total += p * (dp - delta[:, None])

        inside = (i < L) & (j < S)
        pair = i.to(tl.int64) * stride_pm + j
        penalty = tl.load(Penalty + pair, mask=inside, other=0.0).to(tl.float32)
        by_strength -= tl.sum(tl.where(total == 0.0, 0.0, total * penalty), 0)
        by_vote = later[None, :] - strength * (below[None, :] + tl.dot(after, total, input_precision=SUM_PRECISION))
        below += tl.sum(total, 0)

        # The vote itself once more, to see whether it was cast.
        Q_own = Q + chosen * stride_qh + at * stride_qm
        own_q = tile(Q_own, m[:, None], d[None, :], stride_qm, stride_qd, left, True, D, PAD_D)
        if UPCAST:
            own_q = own_q.to(tl.float32)
        M_own = Mask
        if MASK != "none":
            M_own = Mask + b * stride_mb + chosen * stride_mh
        own_slope = 0.0
        if ALIBI:
            own_slope = tl.load(Slopes + chosen).to(tl.float32)
        product = tl.dot(own_q, tl.trans(own_k), input_precision=PRECISION)
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
            own_slope,
            M_own,
            stride_mm,
            stride_mn,
            Penalty,
            stride_pm,
            0.0,
            True,
            CAUSAL,
            WINDOW,
            MASK,
            SOFTCAP,
            ALIBI,
            False,
        )
        if not ADDED:
            z = z * scale
        cast = (i + offset != j) & (i < L) & free[None, :] & (z > 0.0)
        dz = tl.where(cast, by_vote, 0.0) * scale
        if SOFTCAP:
            t = bent(product, scale, softcap)
            dz = dz * (1 - t * t)
        dz = narrow(dz, DVotes, UPCAST)
        tl.store(DVotes + pair, dz, mask=inside)
        dk += tl.dot(tl.trans(dz), own_q, input_precision=PRECISION)

    column = (b * S + cols)[:, None]
    tl.store(DSelected + column * D + d[None, :], dk, mask=(cols[:, None] < S) & (d[None, :] < D))
    tl.store(DEarlier + b * S + cols, later - strength * below, mask=cols < S)
    tl.store(DStrength + b * S + cols, by_strength / LOG2E, mask=cols < S)
