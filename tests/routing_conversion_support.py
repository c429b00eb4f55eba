"""What the tests of routing attention on whole models share."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES, Family, build, padded
from torch import Tensor, nn

import attnrewrite
from attnrewrite import RoutingConfig
from attnrewrite.variants.centroids import Centroids

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
SETTINGS: dict[str, Any] = {"clusters": 3, "window_size": 4}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def inputs_of(name: str, *, padding: bool = False) -> dict[str, Any]:
    inputs = BY_NAME[name].inputs()
    return padded(inputs) if padding else inputs


def routed(
    name: str = "llama",
    config: RoutingConfig | None = None,
    *,
    ready: bool = True,
    padding: bool = False,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A tiny model, converted and calibrated on its own inputs."""
    model = build(BY_NAME[name], "sdpa").to(dtype)
    inputs = inputs_of(name, padding=padding)
    attnrewrite.convert(model, config or RoutingConfig(**SETTINGS), example_kwargs=inputs)
    model.to(dtype)
    if ready:
        attnrewrite.calibrate(model, [inputs])
    return model


def holders(model: nn.Module) -> list[Centroids]:
    return [module for module in model.modules() if isinstance(module, Centroids)]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}
