"""The kernels of the dense family by name, and the flags that they are specialised for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from attnrewrite.kernels.generation.emit import Emitted, Flag, emit, flags_of


class Template(NamedTuple):
    """A function of a module in ``kernels/templates``."""

    module: str
    function: str


KERNELS = {
    "forward": Template("forward", "attention_forward"),
    "delta": Template("delta", "attention_delta"),
    "backward_keys": Template("backward_keys", "attention_backward_keys"),
    "backward_values": Template("backward_keys", "attention_backward_keys"),
    "backward_queries": Template("backward_queries", "attention_backward_queries"),
    "backward_shared": Template("backward_shared", "attention_backward_shared"),
    "decode": Template("decode", "attention_decode"),
    "merge": Template("decode", "attention_merge"),
    "votes": Template("votes", "selective_votes"),
    "live": Template("live", "selective_live"),
    "backward_logits": Template("backward_logits", "selective_backward_logits"),
    "backward_votes": Template("backward_votes", "selective_backward_votes"),
}

VARIANTS: dict[str, dict[str, Flag]] = {
    "sdpa": {},
    "ssa": {"TEMPERATURES": True},
    "symmetric": {},
    "selective": {"PENALTY": True},
}
"""What each variant sets."""

OF_VOTES = ("votes", "live", "backward_logits", "backward_votes")
"""Kernels of selective attention alone."""


OF_SYMMETRY = ("backward_shared",)
"""Kernels of symmetric attention alone."""


def users(name: str) -> tuple[str, ...]:
    """Return variants that use a kernel: one of those for which it is the same."""
    if name in OF_VOTES:
        return ("selective",)
    if name in OF_SYMMETRY:
        return ("symmetric",)
    return ("sdpa",) if name in ("delta", "merge") else ("sdpa", "ssa", "selective")


_WIDEST_TOGETHER = 128


def made_apart(D: int, Dv: int) -> bool:
    """Whether dk and dv are made by kernels of their own: no program has registers for both of such wide heads."""
    return max(padded(D), padded(Dv)) > _WIDEST_TOGETHER


OF_VALUES: dict[str, Flag] = {"GRADIENTS": "values"}
"""What tells ``backward_values`` from ``backward_keys``."""


def used(name: str, variant: str, *, causal: bool = True) -> dict[str, Flag]:
    """Return the flags with which a variant uses a kernel, masks aside. A step of one query counts its own votes."""
    own = {"CAUSAL": causal, **(OF_VALUES if name == "backward_values" else {})}
    if variant != "selective":
        return {**own, **VARIANTS[variant]}
    return {**own, **({"VOTES": True} if name == "decode" else {"PENALTY": True, "SKIPS": causal})}


_OFF: dict[str, Flag] = {
    "GROUP": 1,
    "CAUSAL": False,
    "WINDOW": False,
    "MASK": "none",
    "SOFTCAP": False,
    "ALIBI": False,
    "SINKS": False,
    "DROPOUT": False,
    "PENALTY": False,
    "VOTES": False,
    "PLACED": False,
    "SKIPS": False,
    "PAIR": False,
    "TEMPERATURES": False,
    "BIAS_GRADIENT": False,
    "SLOPE_GRADIENT": False,
    "GRADIENTS": "both",
    "PRECISION": "ieee",
    "SUM_PRECISION": "tf32",
    "UPCAST": False,
}


def flags(D: int, Dv: int, settings: Mapping[str, Flag]) -> dict[str, Flag]:
    """Return every flag of the family: those in ``settings``, else off.

    Raises ValueError for a setting that is no flag.
    """
    unknown = sorted(set(settings) - set(_OFF))
    if unknown:
        raise ValueError(f"there is no flag {unknown[0]!r}; flags are {', '.join(_OFF)}")
    made = {"GRADIENTS": "keys" if made_apart(D, Dv) else "both"}
    return {"D": D, "DV": Dv, "PAD_D": padded(D), "PAD_DV": padded(Dv), **_OFF, **made, **settings}


def kernel(name: str, given: Mapping[str, Flag]) -> Emitted:
    """Return kernel ``name`` for the flags in ``given``, of which it takes its own."""
    template = KERNELS[name]
    return emit(*template, {flag: given[flag] for flag in flags_of(*template)})


def padded(features: int) -> int:
    """Return the power of two, at least 16, that a tile needs to hold so many features."""
    return max(16, 1 << math.ceil(math.log2(max(features, 1))))
