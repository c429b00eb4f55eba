"""From products of queries and keys to scores: what every kernel of the dense family does to a tile.

Rows are query positions and cols key positions; one of the two is ``[n, 1]`` and the other ``[1, n]``, so that a tile
may stand either way. The pointer into the mask is that of one batch entry and head.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scored(
    s,  # q . k, float32
    rows,
    cols,
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    window,
    scale,
    softcap,
    slope,
    Mask,
    stride_mm,
    stride_mn,
    taken,  # a tile of the penalty
    MASKED: tl.constexpr,  # whether positions may hide a key of this tile
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PENALTY: tl.constexpr,
):
    """Return what is added up to logits in base 2, -inf for hidden keys; with no addend, s as it is, without scale."""
    if SOFTCAP:
        s = bent(s, scale, softcap)
        s = s * (softcap * LOG2E)
    elif ALIBI or PENALTY or MASK == "bias":
        s = s * (scale * LOG2E)
    if ALIBI:
        away = apart(rows, cols, offset, CAUSAL)
        s -= away * (slope * LOG2E)
    if PENALTY:
        s -= taken.to(tl.float32)
    if MASK == "bias":
        added = tl.load(
            Mask + rows.to(tl.int64) * stride_mm + cols * stride_mn, mask=(rows < L) & (cols < S), other=0.0
        )
        s += added.to(tl.float32) * LOG2E
    if MASK == "keys":
        seen = tl.load(Mask + cols * stride_mn, mask=cols < S, other=0)
        s = tl.where(seen != 0, s, float("-inf"))
    if MASK == "pairs":
        seen = tl.load(Mask + rows.to(tl.int64) * stride_mm + cols * stride_mn, mask=(rows < L) & (cols < S), other=0)
        s = tl.where(seen != 0, s, float("-inf"))
    if MASKED:
        s = tl.where(cols < S, s, float("-inf"))
        if CAUSAL:
            s = tl.where(cols <= rows + offset, s, float("-inf"))
        if WINDOW:
            s = tl.where(cols > rows + offset - window, s, float("-inf"))
    return s


@triton.jit
def apart(rows, cols, offset, CAUSAL: tl.constexpr):
    """Return how far key and query of a visible pair lie apart."""
    between = rows + offset - cols
    if not CAUSAL:
        between = tl.abs(between)
    return between.to(tl.float32)


@triton.jit
def tile(
    P,
    places,  # [n, 1] or [1, n], from the one that P points to
    features,  # [1, d] or [d, 1]
    stride_n,
    stride_d,
    length,  # of what is there from P on
    BOUNDED: tl.constexpr,  # whether a place may lie beyond the end
    D: tl.constexpr,
    PAD: tl.constexpr,
):
    """Load a tile of rows of features, 0 beyond their ends."""
    if BOUNDED and D < PAD:
        x = tl.load(P + places * stride_n + features * stride_d, mask=(places < length) & (features < D), other=0.0)
    elif BOUNDED:
        x = tl.load(P + places * stride_n + features * stride_d, mask=places < length, other=0.0)
    elif D < PAD:
        x = tl.load(P + places * stride_n + features * stride_d, mask=features < D, other=0.0)
    else:
        x = tl.load(P + places * stride_n + features * stride_d)
    return x


@triton.jit
def narrow(x, like, UPCAST: tl.constexpr):
    """Round float32 to the type of what ``like`` points to, as an operand of a product or to be stored.

    The interpreter cuts bfloat16 off instead of rounding, and multiplies it wrongly: there the result stays float32.
    """
    if UPCAST:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to the nearest, ties to even
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(like.dtype.element_ty)
    return x


@triton.jit
def bent(s, scale, softcap):
    """Return tanh(scale s / softcap)."""
    power = tl.exp2(s * (scale / softcap * (2 * LOG2E)))
    return 1 - 2 / (power + 1)


@triton.jit
def survives(rows, cols, head, Seed, threshold):
    """Return where dropout keeps a weight: Philox of its own position, whatever the tiles are."""
    seed = tl.load(Seed)
    drawn, _, _, _ = tl.philox(seed, (rows + cols * 0).to(tl.uint32), (cols + rows * 0).to(tl.uint32), head, 0)
    return drawn >= threshold
