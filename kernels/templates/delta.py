"""What backward needs of each row: the product of output and its gradient."""

import triton
import triton.language as tl

from attnrewrite.kernels.templates.scores import tile


@triton.jit
def attention_delta(
    Out,  # [B, H, L, Dv]
    DOut,  # [B, H, L, Dv]
    Delta,  # [B, H, L]
    stride_ob,
    stride_oh,
    stride_om,
    stride_gb,  # of dout
    stride_gh,
    stride_gm,
    stride_gd,
    H,
    L,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write the sum of out * dout over features."""
    blocks = tl.cdiv(L, BLOCK_M)
    bh = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    dv = tl.arange(0, PAD_DV)
    Out += b * stride_ob + h * stride_oh + first.to(tl.int64) * stride_om
    DOut += b * stride_gb + h * stride_gh + first.to(tl.int64) * stride_gm
    out = tile(Out, m[:, None], dv[None, :], stride_om, 1, L - first, True, DV, PAD_DV)
    grad = tile(DOut, m[:, None], dv[None, :], stride_gm, stride_gd, L - first, True, DV, PAD_DV)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(Delta + bh.to(tl.int64) * L + first + m, delta, mask=first + m < L)
