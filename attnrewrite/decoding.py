"""How a converted layer reaches the state that it keeps in a key-value cache, and lets the cache settle afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attnrewrite.kernels.diagnostics import error

if TYPE_CHECKING:
    from attnrewrite.hooks import EnterHook


def state_layer(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], hook: EnterHook) -> Any:
    """Return the layer of the cache in a call of ``module`` that holds its state; None where there is no cache.

    An empty ordinary layer of the cache is replaced by one that holds state. Raises VariantError AR323 for a cache
    that cannot hold it, or that holds keys without it.
    """
    for value in (*args, *kwargs.values()):
        cache = getattr(value, "self_attention_cache", value)  # of an encoder-decoder's pair
        if hasattr(cache, "get_mask_sizes"):  # what only transformers' caches have
            return _adopted(cache, _index(module, hook.layer), hook)
    return None


def _index(module: torch.nn.Module, layer: str) -> Any:
    """Return which layer of a cache is the module's own, which transformers notes in every attention."""
    for name in ("layer_idx", "layer_id"):
        if hasattr(module, name):
            return getattr(module, name)
    raise error("AR323", f"a {type(module).__name__} does not say which of its layers it uses", layer=layer)


def _adopted(cache: Any, index: Any, hook: EnterHook) -> Any:
    from attnrewrite.inference.layers import KINDS, StateLayer

    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[index]
    if isinstance(held, StateLayer):
        return held
    if type(held) not in KINDS:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise error("AR323", f"a {type(held).__name__} is no {kinds}", layer=hook.layer)
    if held.is_initialized:
        raise error(
            "AR323", "the cache holds keys of a model that did not keep the state of this one", layer=hook.layer
        )
    made = KINDS[type(held)].like(held, hook.config)
    if hook.drafts:
        made.activate_past_recording()
    cache.layers[index] = made
    return made
