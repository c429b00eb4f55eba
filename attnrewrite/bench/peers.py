"""What others offer for the same: torch's fused operators, FlexAttention, and the formulas as eager models write them.

The rules of a fair comparison: everything at its best setting, masks built beforehand, no dynamic shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnrewrite.bench.attentions import Attention, Maker, UnsupportedError
from attnrewrite.bench.case import Attend, Setting
from attnrewrite.bench.variants import of_config
from attnrewrite.kernels.diagnostics import closest, error
from attnrewrite.kernels.sdpa.reference import attention_logits
from attnrewrite.kernels.selective import reference as selective
from attnrewrite.kernels.ssa.reference import scaled
from attnrewrite.kernels.symmetric import reference as symmetric
from attnrewrite.kernels.visibility import repeat_kv
from attnrewrite.variants import SdpaConfig, SelectiveConfig, SSAConfig, SymmetricConfig

_TMA = (9, 0)
"""The first compute capability with a tensor memory accelerator."""


def peer(name: str) -> Attention:
    """Look one up. Raises CaptureError AR102 for a name that is not there."""
    if name not in PEERS:
        raise error("AR102", f"there is no baseline {name!r}; {closest(name, PEERS)}")
    return PEERS[name]


def _fused(backend: SDPBackend | None) -> Maker:
    def make(s: Setting) -> Attend:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=s.case.masked, enable_gqa=_grouped(s))

        def on_backend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert backend is not None
            with sdpa_kernel(backend):
                return call(q, k, v)

        return call if backend is None else on_backend

    return make


def _grouped(s: Setting) -> bool:
    return s.case.Hkv != s.case.H


def _whole(s: Setting) -> Attend:
    """Attend as eager models write it, with whole score matrices."""

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = attention_logits(query, key, None, scale=None, softcap=None)
        if s.case.masked:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(later, float("-inf"))
        return logits.softmax(-1).to(value.dtype) @ repeat_kv(value, query.shape[1])

    return plain


def _whole_ssa(s: Setting) -> Attend:
    attend = _whole(s)
    tau_q, tau_v = s.learned(s.uniform("tau_q", "B", "H", "L")), s.learned(s.uniform("tau_v", "B", "Hkv", "N"))
    return lambda q, k, v: attend(scaled(q, tau_q), k, scaled(v, tau_v))


def _whole_selective(s: Setting) -> Attend:
    _check_selective(s)
    return lambda q, k, v: selective.selective_attention(q, k, v, enable_gqa=True)


def _whole_symmetric(s: Setting) -> Attend:
    return lambda q, k, v: symmetric.symmetric_attention(k, v, is_causal=s.case.causal)


def _compiled(make: Maker) -> Maker:
    return lambda s: s.compile(make(s))


def _flex(options: dict[str, Any] | None) -> Maker:
    def make(s: Setting) -> Attend:
        attend, mask = _tuned(s), _causal(s)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if s.device.type == "cpu":  # where it has no backward pass
                q, k, v = q.detach(), k.detach(), v.detach()
            out: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=_grouped(s), kernel_options=options)
            return out

        return call

    return make


def _flex_votes(s: Setting) -> Attend:
    """Make selective attention as FlexAttention can have it: compiled votes, which a score_mod reads."""
    _check_selective(s)
    attend, mask = _tuned(s), _causal(s)
    penalties = s.compile(_penalties)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = query.detach(), key.detach(), value.detach()
        penalty = penalties(query, key)
        out: Tensor = attend(
            query,
            key,
            value,
            score_mod=lambda x, b, h, i, j: x - penalty[b, i, j],
            block_mask=mask,
            enable_gqa=_grouped(s),
        )
        return out

    return call


def _penalties(query: Tensor, key: Tensor) -> Tensor:
    """Return F [B, N, N] of head 0: the votes of strictly earlier rows; none on oneself, nor on the first key."""
    logits = (query[:, 0] @ key[:, 0].mT).float() * query.shape[-1] ** -0.5
    votes = logits.relu().tril(-1)
    votes[:, :, 0] = 0
    penalty: Tensor = (votes.cumsum(1) - votes).half()
    return penalty


def _tuned(s: Setting) -> Callable[..., Any]:
    """Return flex_attention, tuned to its maximum."""
    return s.compile(flex_attention, mode="max-autotune-no-cudagraphs")


def _causal(s: Setting) -> Any:
    if not s.case.masked:
        return None
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, s.case.N, s.case.N, device=s.device)


def _check_selective(s: Setting) -> None:
    if not s.case.masked:
        raise UnsupportedError("its votes are those of causal attention over a whole sequence")


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA GPU"


def _needs_tma(device: torch.device) -> str | None:
    lacking = _needs_cuda(device)
    if lacking is None and torch.cuda.get_device_capability() < _TMA:
        return "needs a GPU of compute capability 9.0 or later"
    return lacking


_PLAIN, _SELECTIVE, _SSA, _SYMMETRIC = (
    of_config(config).formula
    for config in (SdpaConfig(), SelectiveConfig(mode="raw"), SSAConfig(), SymmetricConfig(form="symmetric"))
)
PEERS = {
    "sdpa": Attention(_fused(None), _PLAIN),
    "sdpa-math": Attention(_fused(SDPBackend.MATH), _PLAIN),
    "sdpa-flash": Attention(_fused(SDPBackend.FLASH_ATTENTION), _PLAIN),
    "sdpa-efficient": Attention(_fused(SDPBackend.EFFICIENT_ATTENTION), _PLAIN, missing=_needs_cuda),
    "sdpa-cudnn": Attention(_fused(SDPBackend.CUDNN_ATTENTION), _PLAIN, missing=_needs_cuda),
    "flex": Attention(_flex(None), _PLAIN),
    "flex-tma": Attention(_flex({"USE_TMA": True}), _PLAIN, missing=_needs_tma),
    "eager": Attention(_whole, _PLAIN),
    "eager-inductor": Attention(_compiled(_whole), _PLAIN),
    "selective-eager": Attention(_whole_selective, _SELECTIVE, heads=None),
    "selective-inductor": Attention(_compiled(_whole_selective), _SELECTIVE, heads=None),
    "selective-flex": Attention(_flex_votes, _SELECTIVE, forward_only=True, heads=None),
    "ssa-eager": Attention(_whole_ssa, _SSA),
    "symmetric-eager": Attention(_whole_symmetric, _SYMMETRIC),
}
"""By name; those that begin with a variant's name are that variant, done by others."""
