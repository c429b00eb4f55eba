"""Tiny models with random weights, from everywhere that attention is written."""

from __future__ import annotations

from dataclasses import dataclass

from zoo import by_hand, hugging_face, torch_nn
from zoo.family import Family, installed

FAMILIES: list[Family] = [*hugging_face.FAMILIES, *torch_nn.FAMILIES, *by_hand.FAMILIES]


@dataclass(frozen=True)
class Source:
    """Where families come from: the package whose version counts, and what to know of its table."""

    name: str
    package: str
    note: str


SOURCES = [
    Source("transformers", "transformers", "Each is the base model of its type, from its own config made small."),
    Source(
        "torch",
        "torch",
        "Encoder layers in eval mode without gradients are one opaque operator, which is taken apart. Encoders and "
        "decoders compare a mask with the causal one and branch on the result, unless is_causal is given: no graph "
        "holds that. flex_attention has no backward on CPU.",
    ),
    Source(
        "written by hand",
        "torch",
        "In the style of well-known small code bases, written anew in `tests/zoo/by_hand.py`.",
    ),
]


def missing(family: Family) -> str:
    """Return the package that ``family`` needs and that is not installed, or ""."""
    return "" if not family.needs or installed(family.needs) else family.needs
