"""selective_votes, specialised by attnrewrite from its template votes.py.

ALIBI = False, CAUSAL = True, D = 64, MASK = 'none', PAD_D = 64, PLACED = False, PRECISION = 'ieee', SKIPS = False,
SOFTCAP = False, SUM_PRECISION = 'tf32', UPCAST = False, WINDOW = False

Digest bc7f7b284db5357c938c4bd6f0ddacb240ecc7bcaccc2d89a241a6bab4fb441f.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def selective_votes(
    Q,  # [B, L, D], of the selection head
    K,  # [B, S, D]
    Earlier,  # [B, S], votes that the keys have received before the first of these queries
    Protected,  # [B, S], keys on which nobody may vote
    Strength,  # of F, one number
    Penalty,  # [B, L, S], written: F times its strength times log2(e)
    Received,  # [B, S], written: votes after the last query
    stride_qb,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kd,
    stride_pb,
    stride_pm,
    stride_cb,  # of protected
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    scale,
    largest,  # number that Penalty can hold
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write F[i, j], the sum of max(logit[k, j], 0) over k < i that may vote on j, down a block of keys.

    A key in a cache that was evicted has received infinite votes."""
    blocks = tl.cdiv(S, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, 64)
    cols = first + n
    j = cols[None, :]
    K += b * stride_kb + tl.cast(first, tl.int64) * stride_kn
    k = tl.load(K + n[:, None] * stride_kn + d[None, :] * stride_kd, mask=n[:, None] < S - first, other=0.0)
    free = tl.load(Protected + b * stride_cb + cols, mask=cols < S, other=1) == 0
    Q += b * stride_qb
    Penalty += b * stride_pb
    received = tl.load(Earlier + b * S + cols, mask=cols < S, other=0.0) * LOG2E
    evicted = received == float('inf')
    strength = tl.load(Strength).to(tl.float32)
    before = (m[:, None] > m[None, :]).to(tl.float32)  # strictly earlier rows

    low = 0
    high = L
    low = tl.maximum(0, first - offset) // BLOCK_M * BLOCK_M
    for first_row in tl.range(low, high, BLOCK_M):
        rows = first_row + m
        i = rows[:, None]
        Q_tile = Q + tl.cast(first_row, tl.int64) * stride_qm
        q = tl.load(
            Q_tile + m[:, None] * stride_qm + d[None, :] * stride_qd,
            mask=m[:, None] < L - first_row,
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision='ieee')
        s = tl.where(j < S, s, float('-inf'))
        s = tl.where(j <= i + offset, s, float('-inf'))
        s = s * (scale * LOG2E)
        may_vote = (i + offset != j) & (i < L) & free[None, :]
        votes = tl.where(may_vote & ((s > 0.0) | (s != s)), s, 0.0)  # NaN stays NaN
        penalty = (received[None, :] + tl.dot(before, votes, input_precision='tf32')) * strength
        penalty = tl.where(penalty > largest, largest, penalty)  # NaN stays NaN
        penalty = tl.where(penalty < -largest, -largest, penalty)
        penalty = tl.where(evicted[None, :], float('inf'), penalty)
        # 0 where no head looks: backward writes in the place of the pairs that it visits, and reads all.
        penalty = tl.where(s == float('-inf'), 0.0, penalty)
        place = i.to(tl.int64) * stride_pm + j
        tl.store(Penalty + place, penalty.to(Penalty.dtype.element_ty), mask=(i < L) & (j < S))
        received += tl.sum(votes, 0)

    tl.store(Received + b * S + cols, received / LOG2E, mask=cols < S)
