"""Tiny models to convert to symmetric attention, and a check that a failure changes none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
from families import FAMILIES, build
from torch import nn

from attnrewrite import AttnRewriteError, SymmetricConfig

BY_NAME = {family.name: family for family in FAMILIES}
ALL = SymmetricConfig(max_error=1.0)
SYMMETRIC = SymmetricConfig("symmetric", max_error=1.0)


def model_of(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "llama with as many keys":
        return tiny.llama(num_key_value_heads=4), BY_NAME["llama"].inputs()
    return build(BY_NAME[name], BY_NAME[name].implementations[-1]), BY_NAME[name].inputs()


def projections(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the query and key projections that are modules of their own."""
    for module in model.modules():
        for q, k in (("q_proj", "k_proj"), ("query", "key")):
            if hasattr(module, q) and hasattr(module, k):
                yield getattr(module, q), getattr(module, k)


def untouched(model: nn.Module, action: Callable[[], Any]) -> AttnRewriteError:
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(AttnRewriteError) as caught:
        action()
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    return caught.value
