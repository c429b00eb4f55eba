"""One call of the dense family: which kernels it needs, and which arguments they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.dense.catalogue import flags
from attnrewrite.kernels.generation.emit import Flag
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.visibility import four_dimensional


@dataclass(frozen=True, eq=False)
class Call:
    """Attention of ``query`` ``[B, H, L, D]`` to ``key`` ``[B, Hkv, S, D]`` and ``value`` ``[B, Hkv, S, Dv]``.

    ``penalty`` ``[B, L, S]`` is taken off the base-2 logits of all heads, and ``death`` ``[B, S]`` in int32 is the
    first row from which on it leaves a key nothing; ``strength`` is the number by which votes count; queries are
    multiplied with ``pair`` ``[H, D, D]``; ``query_temperature`` ``[B, H, L]`` and ``value_temperature``
    ``[B, Hkv, S]`` come together.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    how: Options
    mask: Tensor | None = None
    penalty: Tensor | None = None
    strength: Tensor | None = None
    death: Tensor | None = None
    pair: Tensor | None = None
    query_temperature: Tensor | None = None
    value_temperature: Tensor | None = None
    seed: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Return (B, H, Hkv, L, S)."""
        B, H, L, _ = self.query.shape
        return B, H, self.key.shape[1], L, self.key.shape[2]

    def flags(self) -> dict[str, Flag]:
        """Return every flag of the family's templates."""
        _, H, Hkv, _, _ = self.sizes
        full = self.query.dtype == torch.float32
        settings: dict[str, Flag] = {
            "GROUP": H // Hkv,
            "CAUSAL": self.how.is_causal,
            "WINDOW": self.how.window is not None,
            "MASK": self.mask_kind(),
            "SOFTCAP": self.how.softcap is not None,
            "ALIBI": self.how.slopes is not None,
            "SINKS": self.how.sinks is not None,
            "DROPOUT": self.how.dropout_p > 0,
            "PENALTY": self.penalty is not None,
            "SKIPS": self.death is not None,
            "PAIR": self.pair is not None,
            "TEMPERATURES": self.query_temperature is not None,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "SUM_PRECISION": "ieee" if full else "tf32",
            "UPCAST": self.query.dtype == torch.bfloat16 and not self.query.is_cuda,
        }
        return flags(self.query.shape[3], self.value.shape[3], settings)

    def arguments(self) -> dict[str, Any]:
        """Return what the templates call by these names. What a kernel has no use for may be None."""
        B, H, _, L, S = self.sizes
        how, p = self.how, self.how.dropout_p
        strides = {
            **named("q", "bhmd", self.query),
            **named("k", "bhnd", self.key),
            **named("v", "bhnd", self.value),
        }
        if self.penalty is not None:
            strides |= {"stride_pb": self.penalty.stride(0), "stride_pm": self.penalty.stride(1)}
        mask = None
        if self.mask is not None:
            mask = self.mask.view(torch.uint8) if self.mask.dtype == torch.bool else self.mask
            mask = four_dimensional(mask).expand(B, H, L, S)
            strides |= named("m", "bhmn", mask)
        return {
            "Q": self.query,
            "K": self.key,
            "V": self.value,
            "Mask": mask,
            "Penalty": self.penalty,
            "Strength": self.strength,
            "Death": self.death,
            "Pair": self.pair,
            "QueryTau": self.query_temperature,
            "ValueTau": self.value_temperature,
            "Sinks": how.sinks,
            "Slopes": how.slopes,
            "Seed": self.seed,
            "B": B,
            "H": H,
            "L": L,
            "S": S,
            "offset": how.offset,
            "window": how.window,
            "scale": how.scale,
            "softcap": how.softcap,
            "threshold": min(round(p * 2**32), 2**32 - 1),
            "kept": 0.0 if p == 1 else 1 / (1 - p),
            **strides,
        }

    def rows(self, rows: slice) -> Call:
        """Return the call of some of the queries. Dropout draws of its own for them."""
        mask = self.mask
        if mask is not None and four_dimensional(mask).shape[2] > 1:
            mask = four_dimensional(mask)[:, :, rows]
        return replace(
            self,
            query=self.query[:, :, rows],
            mask=mask,
            how=replace(self.how, offset=self.how.offset + rows.start),
            seed=None if self.seed is None else self.seed + rows.start,
        )

    def mask_kind(self) -> str:
        """Return "none", "keys" for the same keys for all queries, "pairs", or "bias"."""
        if self.mask is None:
            return "none"
        if self.mask.dtype != torch.bool:
            return "bias"
        return "keys" if four_dimensional(self.mask).shape[2] == 1 else "pairs"


def options(
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    offset: int = 0,
) -> Options:
    """Collect what an operator of the family is given."""
    sinks, slopes = (None if x is None else x.contiguous() for x in (sinks, alibi_slopes))
    return Options(scale, is_causal, window, softcap, dropout_p=dropout_p, offset=offset, sinks=sinks, slopes=slopes)


def named(letter: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """Name the strides of a tensor: ``stride_qb`` and so on."""
    return {f"stride_{letter}{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def chosen(names: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of these names."""
    return {name: values[name] for name in names if name in values}
