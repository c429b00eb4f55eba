"""How a converted layer reaches the state that it keeps in a key-value cache, and lets the cache settle afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attnrewrite.kernels.diagnostics import error

if TYPE_CHECKING:
    from attnrewrite.hooks import EnterHook


_OTHER_SEQUENCES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""What layers of transformers are given to attend to another sequence than their own."""


def state_layer(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], hook: EnterHook) -> Any:
    """Return the layer of the cache in a call of ``module`` that holds its state; None where there is no cache.

    An empty ordinary layer of the cache is replaced by one that holds state. A cache that cannot hold it, or that holds
    keys without it, is VariantError AR323, or None where the variant can do without, in cross-attention, too.
    """
    if hook.config.state_is_optional and any(kwargs.get(name) is not None for name in _OTHER_SEQUENCES):
        return None
    for value in (*args, *kwargs.values()):
        cache = getattr(value, "self_attention_cache", value)  # of an encoder-decoder's pair
        if hasattr(cache, "get_mask_sizes"):  # what only transformers' caches have
            return _adopted(cache, module, hook)
    return None


def _index(module: torch.nn.Module) -> Any:
    """Return which layer of a cache is the module's own, which transformers notes in every attention, or None."""
    return getattr(module, "layer_idx", getattr(module, "layer_id", None))


def _adopted(cache: Any, module: torch.nn.Module, hook: EnterHook) -> Any:
    from attnrewrite.inference.layers import StateLayer
    from attnrewrite.inference.static import KINDS

    index, optional = _index(module), hook.config.state_is_optional
    replicated = cache.layer_class_to_replicate
    while index is not None and len(cache.layers) <= index and replicated is not None:
        cache.layers.append(replicated())
    held = cache.layers[index] if index is not None and index < len(cache.layers) else None
    if isinstance(held, StateLayer):
        if held.config is not None and held.config.variant != hook.config.variant:
            detail = f"the cache holds the state of {held.config.variant}, the layer is {hook.config.variant}"
            raise error("AR323", detail, layer=hook.layer)
        return held
    if held is None:
        unfit = "the layer does not say which layer of the cache is its own"
    elif optional and getattr(module, "store_full_length_kv", False):
        unfit = "other layers read what this one keeps in the cache"
    elif type(held) not in KINDS:
        unfit = f"a {type(held).__name__} is no {', '.join(kind.__name__ for kind in KINDS)}"
    elif held.is_initialized:
        unfit = "the cache holds keys of a model that did not keep the state of this one"
    else:
        made = KINDS[type(held)].like(held, hook.config)
        if hook.drafts:
            made.activate_past_recording()
        cache.layers[index] = made
        return made
    # Where keys left a window, nothing else tells how many there were.
    if optional and not getattr(module if held is None else held, "is_sliding", False):
        return None
    raise error("AR323", unfit, layer=hook.layer)
