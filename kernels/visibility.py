"""What all variants share about their arguments: shapes, dtypes, and which key a query sees."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error


def visible(
    L: int,
    S: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    attn_mask: Tensor | None = None,
    device: torch.device | None = None,
    first: int | Tensor = 0,
) -> Tensor | None:
    """Return the boolean mask of visible keys, True = visible, or None when every key is visible.

    Args:
        L: number of queries.
        S: number of keys.
        is_causal: key j is visible to query i iff j <= i, both counted from the first, as in
            ``torch.nn.functional.scaled_dot_product_attention``.
        window: with ``is_causal``, key j must also satisfy i - j < window.
        attn_mask: boolean (True = visible) or additive (-inf = invisible), broadcastable to ``[B, H, L, S]``.
        device: where the mask is built.
        first: the position of query 0 among the keys, for ``is_causal``.

    Returns:
        A tensor that broadcasts to ``[B, 1 or H, L, S]``, or None.

    Raises:
        LoweringError: AR402, a window without ``is_causal``, or of less than one key.
    """
    check_window(window, is_causal)
    seen = None
    if is_causal:
        lag = torch.arange(L, device=device).unsqueeze(-1) + first - torch.arange(S, device=device)  # [L, S]
        seen = lag >= 0
        if window is not None:
            seen = seen & (lag < window)
    if attn_mask is None:
        return seen
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf")
    return allowed if seen is None else seen & allowed


def additive(attn_mask: Tensor | None) -> Tensor | None:
    """Return ``attn_mask`` if it is a bias to add to the logits, None if it is boolean or absent."""
    return None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask


def four_dimensional(attn_mask: Tensor) -> Tensor:
    """Give a mask of fewer dimensions the leading ones that broadcasting would give it."""
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def repeat_kv(states: Tensor, H: int) -> Tensor:
    """Repeat each KV head for the query heads of its group: ``[B, Hkv, S, D]`` -> ``[B, H, S, D]``."""
    B, Hkv, S, D = states.shape
    if Hkv == H:
        return states
    return states.unsqueeze(2).expand(B, Hkv, H // Hkv, S, D).reshape(B, H, S, D)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits, weights and sums are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: it would take the float32 products back to 16 bit."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Raise AR402 unless the arguments that every attention function takes fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise error("AR402", f"{name} has {tensor.dim()} dimensions, {_size(tensor)}; needed are 4")
        if not tensor.is_floating_point():
            raise error("AR402", f"{name} has dtype {tensor.dtype}; needed is a float dtype", hint="")
    for name, tensor in (("key", key), ("value", value)):
        _check_placement(query, name, tensor)
    _check_sizes(query, key, value, enable_gqa)
    check_window(window, is_causal)
    if not 0.0 <= dropout_p <= 1.0:
        raise error("AR402", f"dropout_p is {dropout_p}; it is a probability, between 0 and 1", hint="")
    if softcap is not None and not softcap > 0:
        raise error("AR402", f"softcap is {softcap}; it must be greater than 0", hint="pass None for no cap")
    if attn_mask is not None:
        _check_mask(query, key, attn_mask)
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None:
            check_shape(name, per_head, "H", (query.shape[1],))
            _check_device(query, name, per_head)


def check_window(window: int | None, is_causal: bool) -> None:
    """Raise AR402 unless the window is absent, or causal and of one key at least."""
    if window is None:
        return
    if not is_causal:
        raise error("AR402", f"window is {window} and is_causal is False", hint="pass is_causal=True")
    if window < 1:
        raise error("AR402", f"window is {window}; a query must see one key at least", hint="")


def _check_placement(query: Tensor, name: str, tensor: Tensor) -> None:
    _check_device(query, name, tensor)
    if tensor.dtype != query.dtype and not _autocasts(query.device):
        raise error("AR402", f"query has dtype {query.dtype}, {name} {tensor.dtype}", hint="cast one of them")


def _check_device(query: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != query.device:
        raise error("AR402", f"query is on {query.device} and {name} on {tensor.device}", hint="")


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    B, H, _, D = query.shape
    Bk, Hkv, S, Dk = key.shape
    if Bk != B or value.shape[0] != B:
        raise error("AR402", f"batch sizes differ: query {B}, key {Bk}, value {value.shape[0]}")
    if Dk != D:
        raise error("AR402", f"head dims differ: query {D}, key {Dk}")
    if value.shape[2] != S:
        raise error("AR402", f"lengths differ: key {S}, value {value.shape[2]}")
    if value.shape[1] != Hkv:
        raise error("AR402", f"head counts differ: key {Hkv}, value {value.shape[1]}")
    if Hkv != H and not enable_gqa:
        raise error(
            "AR402",
            f"query has {H} heads, key and value have {Hkv}",
            hint="pass enable_gqa=True to share each KV head among a group of query heads",
        )
    if H % Hkv != 0:
        raise error("AR402", f"query has {H} heads, not a multiple of the {Hkv} heads of key and value")


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor) -> None:
    if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32) and not _autocasts(query.device):
        raise error(
            "AR402",
            f"attn_mask has dtype {attn_mask.dtype}; needed is torch.bool, torch.float32 or {query.dtype}",
            hint="a boolean mask is True where the key is visible, a float mask is added to the logits",
        )
    _check_device(query, "attn_mask", attn_mask)
    B, H, L, _ = query.shape
    check_broadcast("attn_mask", attn_mask, (B, H, L, key.shape[2]))


def check_broadcast(name: str, tensor: Tensor, full: tuple[int, ...]) -> None:
    """Raise AR402 unless ``tensor`` broadcasts to the shape ``full``."""
    aligned = zip(reversed(tensor.shape), reversed(full), strict=False)
    if tensor.dim() > len(full) or any(size not in (1, wanted) for size, wanted in aligned):
        wanted_text = " x ".join(str(size) for size in full)
        raise error("AR402", f"{name} is {_size(tensor)}, which does not broadcast to {wanted_text}", hint="")


def check_shape(name: str, tensor: Tensor, letters: str, wanted: tuple[int, ...]) -> None:
    """Raise AR402 unless ``tensor`` is of a float dtype and of the shape ``wanted``, written ``letters``."""
    if tuple(tensor.shape) != wanted:
        wanted_text = " x ".join(str(size) for size in wanted)
        raise error("AR402", f"{name} is {_size(tensor)}; needed is {letters} = {wanted_text}", hint="")
    if not tensor.is_floating_point():
        raise error("AR402", f"{name} has dtype {tensor.dtype}; needed is a float dtype", hint="")


def _size(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a scalar"
