"""Few queries and many keys: the keys are split among programs, and the parts put together by ``attention_merge``."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import LOG2E, narrow, scored, tile


@triton.jit
def attention_decode(
    Q,  # [B, H, L, D]
    K,  # [B, Hkv, S, D]
    V,  # [B, Hkv, S, Dv]
    Parts,  # [B, H, L, splits, Dv], written: the output over the keys of a split
    PartLse,  # [B, H, L, splits], written: its log-sum-exp
    QueryTau,  # [B, H, L]
    ValueTau,  # [B, Hkv, S]
    Mask,  # [B, H, L, S], any stride may be 0
    Penalty,  # [B, L, S], times log2(e)
    Strength,  # of the penalty, one number
    Earlier,  # [B, S], votes that the keys have received before the query
    Protected,  # [B, S], keys on which nobody may vote
    Position,  # of the query among the keys, one int64
    Received,  # [B, S], written: votes after the query
    Sinks,  # [H]
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
    splits,
    share,  # keys of a split, a multiple of BLOCK_N
    selection_head,
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
    SINKS: tl.constexpr,
    PENALTY: tl.constexpr,
    VOTES: tl.constexpr,  # one query, whose votes are counted here
    PLACED: tl.constexpr,  # whether the position is what offset would be
    TEMPERATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 products are wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the parts of one split. Rows of a tile are the queries of all heads that share keys and values."""
    ADDED: tl.constexpr = SOFTCAP or ALIBI or PENALTY or MASK == "bias"
    blocks = tl.cdiv(GROUP * L, BLOCK_M)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    bh = tl.program_id(0) // (blocks * splits)
    b = (bh // (H // GROUP)).to(tl.int64)
    hk = (bh % (H // GROUP)).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_D)
    dv = tl.arange(0, PAD_DV)
    r = block * BLOCK_M + m
    h = hk * GROUP + tl.minimum(r // L, GROUP - 1)  # what lies behind the last row repeats one of the last head
    rows = r % L
    i = rows[:, None]
    row_of = (b * H + h) * L + rows
    Q_rows = Q + b * stride_qb + h * stride_qh + rows.to(tl.int64) * stride_qm
    q = tile(Q_rows[:, None], 0, d[None, :], 0, stride_qd, 1, False, D, PAD_D)
    if TEMPERATURES:
        tau = tl.load(QueryTau + row_of).to(tl.float32)
        q = narrow(q.to(tl.float32) * tau[:, None], Q, UPCAST)
    if UPCAST:
        q = q.to(tl.float32)
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    if MASK != "none":
        Mask += b * stride_mb + h[:, None] * stride_mh
    slope = 0.0
    if ALIBI:
        slope = tl.load(Slopes + h).to(tl.float32)[:, None]
    if VOTES:
        strength = tl.load(Strength).to(tl.float32)
    if PENALTY:
        Penalty += b * stride_pb
    if PLACED:
        offset = tl.load(Position).to(tl.int32)

    start = split * share
    stop = tl.minimum(S, start + share)
    if CAUSAL:
        stop = tl.minimum(stop, L + offset)
    if WINDOW and not VOTES:  # votes are counted of all keys
        start = tl.maximum(start, tl.maximum(0, offset - window + 1) // BLOCK_N * BLOCK_N)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # one more column, which has a weight and no value
        first_split = tl.where(split == 0, 0.0, float("-inf"))
        best = tl.load(Sinks + h).to(tl.float32) * LOG2E + first_split
        total += tl.where(split == 0, 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, PAD_DV], tl.float32)
    for first in tl.range(start, stop, BLOCK_N):
        cols = first + n
        j = cols[None, :]
        place = tl.cast(first, tl.int64)
        k = tile(K + place * stride_kn, n[:, None], d[None, :], stride_kn, stride_kd, S - first, True, D, PAD_D)
        v = tile(V + place * stride_vn, n[:, None], dv[None, :], stride_vn, stride_vd, S - first, True, DV, PAD_DV)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        inside = (i < L) & (j < S)
        taken = tl.load(Penalty + i.to(tl.int64) * stride_pm + j, mask=inside, other=0.0) if PENALTY else 0.0
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
            taken,
            True,
            CAUSAL,
            WINDOW,
            MASK,
            SOFTCAP,
            ALIBI,
            PENALTY,
        )
        if not ADDED:
            s = s * (scale * LOG2E)
        if VOTES:
            received = tl.load(Earlier + b * S + cols, mask=cols < S, other=0.0)
            free = tl.load(Protected + b * stride_cb + cols, mask=cols < S, other=1) == 0
            vote = tl.sum(tl.where((r[:, None] == selection_head % GROUP), s, 0.0), 0)
            cast = free & (cols != offset) & ((vote > 0.0) | (vote != vote))  # NaN stays NaN
            after = received + tl.where(cast, vote, 0.0) / LOG2E
            owner = (hk == selection_head // GROUP) & (block == selection_head % GROUP // BLOCK_M)
            tl.store(Received + b * S + cols, after, mask=owner & (cols < S))
            gone = received == float("inf")  # evicted
            s = tl.where(gone[None, :], float("-inf"), s - strength * LOG2E * tl.where(gone, 0.0, received)[None, :])
        higher = tl.maximum(best, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + tl.sum(p, 1)
        if TEMPERATURES:
            rho = tl.load(ValueTau + (b * (H // GROUP) + hk) * S + cols, mask=cols < S, other=0.0)
            p = p * rho.to(tl.float32)[None, :]
        p = narrow(p, V, UPCAST)
        acc = tl.dot(p, v, acc * shrunk[:, None], input_precision=PRECISION)
        best = higher

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    real = r < GROUP * L
    part = row_of * splits + split
    tl.store(Parts + part[:, None] * DV + dv[None, :], acc, mask=real[:, None] & (dv[None, :] < DV))
    tl.store(PartLse + part, best + tl.log2(total), mask=real)


@triton.jit
def attention_merge(
    Parts,  # [B, H, L, splits, Dv]
    PartLse,  # [B, H, L, splits]
    Out,  # [B, H, L, Dv], written
    Lse,  # [B, H, L], written
    rows,  # B H L
    splits,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose bfloat16 is not rounded
    BLOCK_M: tl.constexpr,
):
    """Write the weighted mean of the parts of each row."""
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    dv = tl.arange(0, PAD_DV)
    inside = (r < rows)[:, None] & (dv[None, :] < DV)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PAD_DV], tl.float32)
    for split in tl.range(0, splits):
        part = r * splits + split
        lse = tl.load(PartLse + part, mask=r < rows, other=float("-inf"))
        mean = tl.load(Parts + part[:, None] * DV + dv[None, :], mask=inside, other=0.0)
        higher = tl.maximum(best, lse)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(lse - shift)
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + weight
        acc = acc * shrunk[:, None] + weight[:, None] * mean
        best = higher
    out = narrow(acc / tl.where(total == 0.0, 1.0, total)[:, None], Out, UPCAST)
    tl.store(Out + r[:, None] * DV + dv[None, :], out, mask=inside)
    tl.store(Lse + r, best + tl.log2(total), mask=r < rows)
