"""What torch itself offers: its attention modules, and its two functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from zoo.family import BATCH, HEADS, LENGTH, WIDTH, Facts, Family, normal

SOURCE = "torch"
HIDDEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDED = (torch.arange(LENGTH) >= LENGTH - 3).expand(BATCH, -1)


class _Direct(nn.Module):
    """One projection, and one of torch's functions on heads [B, H, L, D]."""

    def __init__(self, kv_heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.heads = (HEADS, kv_heads, kv_heads)
        self.sizes = [heads * WIDTH // HEADS for heads in self.heads]
        self.qkv, self.options = nn.Linear(WIDTH, sum(self.sizes)), options
        self.slope = nn.Parameter(torch.rand(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.qkv(x).split(self.sizes, -1), self.heads, strict=True)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y, heads in parts)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class _Flex(_Direct):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, **self.options)


class _Sloped(_Direct):
    """A score_mod that reads a parameter."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + self.slope[h] * (j - i))


class _MaskedInside(_Direct):
    """A block mask that is made anew in every call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=_block_mask())


def _block_mask() -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, device="cpu")


def _facts(model: nn.Module) -> Facts:
    return Facts(frozenset({HEADS}), frozenset({HEADS, 2}))


def _family(
    name: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], trains: bool = True
) -> Family:
    def only(implementation: str) -> nn.Module:
        if implementation != "eager":
            raise ValueError("torch decides by itself")
        return make()

    return Family(SOURCE, name, only, lambda model: inputs(), _facts, trains)


def _attention(name: str, inputs: dict[str, Any] | None = None, **options: Any) -> Family:
    def given() -> dict[str, Any]:
        x = normal(BATCH, LENGTH, WIDTH)
        return {"query": x, "key": x, "value": x, "need_weights": False, **(inputs or {})}

    make = functools.partial(nn.MultiheadAttention, WIDTH, HEADS, **{"batch_first": True, **options})
    return _family(f"MultiheadAttention{name}", make, given)


def _encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **options)


def _decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **options)


def _encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoder(_encoder_layer(**options), 2)


def _transformer() -> nn.Module:
    return nn.Transformer(WIDTH, HEADS, 2, 2, 2 * WIDTH, batch_first=True)


def _states(**masks: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"src": normal(BATCH, LENGTH, WIDTH), **masks}


def _pair(first: str, **masks: Any) -> Callable[[], dict[str, Any]]:
    second = {"tgt": "memory", "src": "tgt"}[first]
    return lambda: {first: normal(BATCH, LENGTH, WIDTH), second: normal(BATCH, 9, WIDTH), **masks}


def _direct(cls: type[nn.Module], name: str, **options: Any) -> Family:
    function = "scaled_dot_product_attention" if cls is _Direct else "flex_attention"
    x = functools.partial(normal, BATCH, LENGTH, WIDTH)
    # flex_attention has no backward on CPU.
    return _family(f"{function}{name}", functools.partial(cls, **options), lambda: {"x": x()}, trains=cls is _Direct)


_CROSS = {"key": normal(BATCH, 9, 24), "value": normal(BATCH, 9, 20)}
_FLOAT = torch.zeros(LENGTH, LENGTH).masked_fill(HIDDEN, float("-inf"))
_FIRST = normal(LENGTH, BATCH, WIDTH)
_SEQUENCE_FIRST = dict.fromkeys(("query", "key", "value"), _FIRST)

FAMILIES = [
    _attention(""),
    _attention(", weights", {"need_weights": True}),
    _attention(", weights per head", {"need_weights": True, "average_attn_weights": False}),
    _attention(", sequence first", _SEQUENCE_FIRST, batch_first=False),
    _attention(", other keys and values", _CROSS, kdim=24, vdim=20),
    _attention(", other keys and values, weights", {**_CROSS, "need_weights": True}, kdim=24, vdim=20),
    _attention(", bool mask", {"attn_mask": HIDDEN}),
    _attention(", float mask", {"attn_mask": _FLOAT}),
    _attention(", is_causal", {"attn_mask": HIDDEN, "is_causal": True}),
    _attention(", mask per head", {"attn_mask": normal(BATCH * HEADS, LENGTH, LENGTH)}),
    _attention(", padding", {"key_padding_mask": PADDED}),
    _attention(", padding, weights", {"key_padding_mask": PADDED, "need_weights": True}),
    _attention(", mask and padding", {"attn_mask": HIDDEN, "key_padding_mask": PADDED}),
    _attention(", mask and padding, weights", {"attn_mask": HIDDEN, "key_padding_mask": PADDED, "need_weights": True}),
    _attention(", bias_kv", add_bias_kv=True),
    _attention(", bias_kv, padding, weights", {"key_padding_mask": PADDED, "need_weights": True}, add_bias_kv=True),
    _attention(", zero_attn", add_zero_attn=True),
    _attention(", no biases", bias=False),
    _family("TransformerEncoderLayer", _encoder_layer, _states()),
    _family("TransformerEncoderLayer, norm first", functools.partial(_encoder_layer, norm_first=True), _states()),
    _family("TransformerEncoderLayer, mask", _encoder_layer, _states(src_mask=HIDDEN)),
    _family("TransformerEncoderLayer, is_causal", _encoder_layer, _states(src_mask=_FLOAT, is_causal=True)),
    _family("TransformerEncoderLayer, padding", _encoder_layer, _states(src_key_padding_mask=PADDED)),
    _family("TransformerEncoderLayer, both", _encoder_layer, _states(src_mask=HIDDEN, src_key_padding_mask=PADDED)),
    _family("TransformerEncoder", _encoder, _states()),
    _family("TransformerEncoder, norm first", functools.partial(_encoder, norm_first=True), _states()),
    _family("TransformerEncoder, mask", _encoder, _states(mask=_FLOAT)),
    _family("TransformerEncoder, mask, is_causal", _encoder, _states(mask=_FLOAT, is_causal=True)),
    _family("TransformerEncoder, padding", _encoder, _states(src_key_padding_mask=PADDED)),
    _family("TransformerDecoderLayer", _decoder_layer, _pair("tgt")),
    _family(
        "TransformerDecoderLayer, norm first, masks",
        functools.partial(_decoder_layer, norm_first=True),
        _pair("tgt", tgt_mask=_FLOAT, tgt_is_causal=True, memory_key_padding_mask=PADDED[:, -9:]),
    ),
    _family("TransformerDecoder", lambda: nn.TransformerDecoder(_decoder_layer(), 2), _pair("tgt", tgt_mask=_FLOAT)),
    _family("Transformer", _transformer, _pair("src")),
    _family(
        "Transformer, masks",
        _transformer,
        _pair(
            "src",
            tgt_mask=_FLOAT[:9, :9],
            src_key_padding_mask=PADDED,
            memory_key_padding_mask=PADDED,
            tgt_key_padding_mask=PADDED[:, 3:],
        ),
    ),
    _direct(_Direct, ""),
    _direct(_Direct, ", is_causal", is_causal=True),
    _direct(_Direct, ", bool mask", attn_mask=~HIDDEN),
    _direct(_Direct, ", bias, scale", attn_mask=normal(HEADS, LENGTH, LENGTH), scale=0.1),
    _direct(_Direct, ", grouped", kv_heads=2, enable_gqa=True, is_causal=True),
    _direct(_Flex, ""),
    _direct(_Flex, ", grouped", kv_heads=2, enable_gqa=True, scale=0.1),
    _direct(_Sloped, ", score_mod"),
    _direct(_Flex, ", block_mask", block_mask=_block_mask()),
    _direct(_MaskedInside, ", block_mask made inside"),
]
