"""Which blocks of keys still count for a block of rows, where votes have put keys out of account."""

import triton
import triton.language as tl


@triton.jit
def selective_live(
    Death,  # [B, S], the first row from which on a key counts for nothing
    Live,  # [B, blocks of rows, blocks of keys], written: the blocks that count, in order
    Lives,  # [B, blocks of rows], written: how many
    L,
    S,
    offset,  # query i stands at position i + offset among the keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_LIST: tl.constexpr,  # of keys at a time
):
    """List the blocks of keys that every row of a block sees, and of which some key counts for its first row."""
    blocks = tl.cdiv(L, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first_row = tl.program_id(0) % blocks * BLOCK_M
    row_block = b * blocks + tl.program_id(0) % blocks
    Live += row_block * tl.cdiv(S, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    seen = tl.minimum(S, tl.maximum(0, first_row + offset + 1)) // BLOCK_N
    count = 0
    for first in tl.range(0, seen, BLOCK_LIST):
        at = first + tl.arange(0, BLOCK_LIST)
        cols = at[:, None] * BLOCK_N + n[None, :]
        death = tl.max(tl.load(Death + b * S + cols, mask=cols < S, other=0), 1)
        counts = ((death > first_row) & (at < seen)).to(tl.int32)
        tl.store(Live + count + tl.cumsum(counts, 0) - 1, at, mask=counts > 0)
        count += tl.sum(counts, 0)
    tl.store(Lives + row_block, count)
