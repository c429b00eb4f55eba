"""Converted models as assistants, which draft tokens for a larger model."""

from __future__ import annotations

from typing import TypeVar

import torch

from attnrewrite.conversion import layer_hooks
from attnrewrite.kernels.diagnostics import error

Model = TypeVar("Model", bound=torch.nn.Module)


def as_assistant(model: Model) -> Model:
    """Prepare a converted model for ``generate(assistant_model=...)`` of another model; return it.

    An assistant drafts token by token, and its cache takes back what the other model did not want. Of each of the last
    64 tokens its caches therefore hold what they did to the state of earlier ones, instead of those of the last call
    alone. For selective attention that is 4 bytes for every such token and token in the cache.

    Raises VariantError AR310 where the model carries no conversion.
    """
    hooks = [hook for _, hook in layer_hooks(model)]
    if not hooks:
        raise error("AR310", f"{type(model).__name__} carries no conversion")
    for hook in hooks:
        hook.drafts = True
    return model
