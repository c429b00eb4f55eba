"""What the tests of routing attention on whole models share."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, build, padded
from torch import Tensor, nn

import attnrewrite
from attnrewrite import RoutingConfig
from attnrewrite.compiled import compile_in_place
from attnrewrite.variants.centroids import Centroids

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
SETTINGS: dict[str, Any] = {"clusters": 3, "window_size": 4}
CONFIG = RoutingConfig(**SETTINGS)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def inputs_of(name: str, *, padding: bool = False) -> dict[str, Any]:
    inputs = BY_NAME[name].inputs()
    return padded(inputs) if padding else inputs


@functools.cache
def _made(name: str, config: RoutingConfig, ready: bool, padding: bool, dtype: torch.dtype) -> nn.Module:
    model = build(BY_NAME[name], "sdpa").to(dtype)
    inputs = inputs_of(name, padding=padding)
    attnrewrite.convert(model, config, example_kwargs=inputs)
    model.to(dtype)
    if ready:
        attnrewrite.calibrate(model, [inputs])
    return model


def routed(
    name: str = "llama",
    config: RoutingConfig = CONFIG,
    *,
    ready: bool = True,
    padding: bool = False,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A tiny model, converted and calibrated on its own inputs; each is made once and copied."""
    model = copy.deepcopy(_made(name, config, ready, padding, dtype))
    compile_in_place(model)
    return model


def holders(model: nn.Module) -> list[Centroids]:
    return [module for module in model.modules() if isinstance(module, Centroids)]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


IDS = inputs_of("llama")["input_ids"]


def trained(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Run one forward and backward in train mode; return the loss."""
    model.train()
    loss = first(model(ids, use_cache=False)).square().mean()
    loss.backward()
    return loss.detach()


def train_one_of_two(rank: int, store: str, path: str) -> None:
    """Train on one half of the batch, as process ``rank`` of two; save the buffers."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, half = routed(ready=False, dtype=torch.float32), IDS[rank : rank + 1]
    with pytest.raises(attnrewrite.AttnRewriteError, match="AR315"):
        trained(model, half)
    attnrewrite.calibrate(model, [IDS])
    trained(nn.parallel.DistributedDataParallel(model), half)
    trained(model, half)
    attnrewrite.update(model)
    torch.save(buffers(model), f"{path}{rank}")
    torch.distributed.destroy_process_group()
