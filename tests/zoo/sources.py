"""Tiny models with random weights, from everywhere that attention is written."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

import torch
from zoo import (
    by_hand,
    diffusers_models,
    hugging_face,
    timm_models,
    torch_nn,
    torchvision_models,
    x_transformers_models,
)
from zoo.family import Family, installed

FAMILIES: list[Family] = [
    *hugging_face.FAMILIES,
    *torch_nn.FAMILIES,
    *by_hand.FAMILIES,
    *diffusers_models.FAMILIES,
    *timm_models.FAMILIES,
    *torchvision_models.FAMILIES,
    *x_transformers_models.FAMILIES,
]


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
        "In the style of well-known small code bases, written anew in `tests/zoo/hand_layers.py`.",
    ),
    Source("diffusers", "diffusers", "Written out and fused by diffusers' own two processors, where they apply."),
    Source("timm", "timm", "timm imports torchvision."),
    Source("torchvision", "torchvision", "The wheel must fit the build of torch."),
    Source("x-transformers", "x-transformers", "A decoder of two layers for each switch of its attention."),
]


def missing(family: Family) -> str:
    """Return the packages that ``family`` needs and that are not installed."""
    return ", ".join(package for package in family.needs if not installed(package))


def _import_torchvision() -> None:
    """Import torchvision, also where its compiled part does not fit the build of torch: the models need none of it."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")

if installed("torchvision"):
    _import_torchvision()
