"""The votes of selective attention, before the main pass: what earlier queries have voted, for every pair."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, scored, tile


@triton.jit
def selective_votes(
    Q,  # [B, L, D], of the selection head
    K,  # [B, S, D]
    Earlier,  # [B, S], votes that the keys have received before the first of these queries
    Protected,  # [B, S], keys on which nobody may vote
    Position,  # of the first query among the keys, one int64
    Limit,  # [B], at which penalty, times log2(e), no weight is left worth counting
    Strength,  # of F, one number
    Penalty,  # [B, L, S], written: F times its strength times log2(e)
    Received,  # [B, S], written: votes after the last query
    Death,  # [B, S], written: the first row from which on a key counts for nothing; L if there is none
    Mask,  # [B, L, S], any stride may be 0
    Slopes,  # of the selection head, one number
    stride_qb,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kd,
    stride_pb,
    stride_pm,
    stride_cb,  # of protected
    stride_mb,
    stride_mm,
    stride_mn,
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    window,
    scale,
    softcap,
    largest,  # number that Penalty can hold
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PLACED: tl.constexpr,  # whether the position is what offset would be
    SKIPS: tl.constexpr,  # whether to write Death
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write F[i, j], the sum of max(logit[k, j], 0) over k < i that may vote on j, down a block of keys.

    A key in a cache that was evicted has received infinite votes.
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
    K += b * stride_kb + tl.cast(first, tl.int64) * stride_kn
    k = tile(K, n[:, None], d[None, :], stride_kn, stride_kd, S - first, True, D, PAD_D)
    if UPCAST:
        k = k.to(tl.float32)
    free = tl.load(Protected + b * stride_cb + cols, mask=cols < S, other=1) == 0
    Q += b * stride_qb
    Penalty += b * stride_pb
    if MASK != "none":
        Mask += b * stride_mb
    slope = 0.0
    if ALIBI:
        slope = tl.load(Slopes).to(tl.float32)
    received = tl.load(Earlier + b * S + cols, mask=cols < S, other=0.0) * LOG2E
    evicted = received == float("inf")
    strength = tl.load(Strength).to(tl.float32)
    if PLACED:
        offset = tl.load(Position).to(tl.int32)
    if SKIPS:
        limit = tl.load(Limit + b)
        death = tl.zeros([BLOCK_N], tl.int32) + L
    before = (m[:, None] > m[None, :]).to(tl.float32)  # strictly earlier rows

    low = 0
    high = L
    if CAUSAL:
        low = tl.maximum(0, first - offset) // BLOCK_M * BLOCK_M
    if WINDOW:
        high = tl.minimum(L, tl.maximum(0, first + BLOCK_N - 1 + window - offset))
    for first_row in tl.range(low, high, BLOCK_M):
        rows = first_row + m
        i = rows[:, None]
        Q_tile = Q + tl.cast(first_row, tl.int64) * stride_qm
        if SKIPS:
            death = tl.where((received * strength > limit) & (death == L), first_row, death)
        q = tile(Q_tile, m[:, None], d[None, :], stride_qm, stride_qd, L - first_row, True, D, PAD_D)
        if UPCAST:
            q = q.to(tl.float32)
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
        if not ADDED:
            s = s * (scale * LOG2E)
        may_vote = (i + offset != j) & (i < L) & free[None, :]
        votes = tl.where(may_vote & ((s > 0.0) | (s != s)), s, 0.0)  # NaN stays NaN
        penalty = (received[None, :] + tl.dot(before, votes, input_precision=SUM_PRECISION)) * strength
        penalty = tl.where(penalty > largest, largest, penalty)  # NaN stays NaN
        penalty = tl.where(penalty < -largest, -largest, penalty)
        penalty = tl.where(evicted[None, :], float("inf"), penalty)
        # 0 where no head looks: backward writes in the place of the pairs that it visits, and reads all.
        if MASK == "bias" or MASK == "pairs":  # may hide from who votes what other heads see
            if CAUSAL:
                penalty = tl.where(j <= i + offset, penalty, 0.0)
            if WINDOW:
                penalty = tl.where(j > i + offset - window, penalty, 0.0)
        else:
            penalty = tl.where(s == float("-inf"), 0.0, penalty)
        place = i.to(tl.int64) * stride_pm + j
        tl.store(Penalty + place, penalty.to(Penalty.dtype.element_ty), mask=(i < L) & (j < S))
        received += tl.sum(votes, 0)

    tl.store(Received + b * S + cols, received / LOG2E, mask=cols < S)
    if SKIPS:
        tl.store(Death + b * S + cols, death, mask=cols < S)
