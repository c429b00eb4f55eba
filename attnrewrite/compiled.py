"""Converted models are compiled in place, so that they can be called at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attnrewrite.backend import Backend
from attnrewrite.dynamo import many_recompilations


def compile_in_place(model: torch.nn.Module) -> None:
    """Compile a converted model, and its encoder, which ``generate`` of transformers calls by itself."""
    for part in _parts(model):
        part.compile(backend=Backend(inner="eager", strict=True), **many_recompilations())


def leave_uncompiled(model: torch.nn.Module) -> None:
    """Undo it."""
    for part in _parts(model):
        part._compiled_call_impl = None


@contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Call the model's own code for a while, not what ``compile`` made of it."""
    parts = _parts(model)
    compiled = [part._compiled_call_impl for part in parts]
    leave_uncompiled(model)
    try:
        yield
    finally:
        for part, implementation in zip(parts, compiled, strict=True):
            part._compiled_call_impl = implementation


def _parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return what is called from outside: the model, and the encoder of one that has a decoder, too."""
    find = getattr(model, "get_encoder", None)
    if not callable(find) or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [model]
    encoder = find()
    return [model, encoder] if isinstance(encoder, torch.nn.Module) and encoder is not model else [model]
