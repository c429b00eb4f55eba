"""A converted folder and the strips of a text that a verb shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from attnrewrite.cli.output import Output
from attnrewrite.kernels.diagnostics import error

if TYPE_CHECKING:
    from attnrewrite.loading import LoadedModel

Function = TypeVar("Function", bound=Callable[..., Any])


def text_option(function: Function) -> Function:
    """Take ``--text``."""
    what = "A UTF-8 text. [default: the text that ships]"
    return click.option("--text", type=click.Path(path_type=Path), help=what)(function)


def load_with_tokenizer(output: Output, model: str, seq_len: int) -> LoadedModel:
    """Load MODEL with its tokenizer. Raises CaptureError AR103 where it has none."""
    from attnrewrite.loading import LoadOptions, load_model

    with output.step(f"loading {model}"):
        loaded = load_model(model, LoadOptions(seq_len=seq_len, with_tokenizer=True))
    if loaded.tokenizer is None:
        detail = f"{model} brings no tokenizer, so that no text can be turned into its tokens"
        raise error("AR103", detail, hint="put the tokenizer's files into the model's folder")
    return loaded


def load_conversion(output: Output, model: str, seq_len: int) -> tuple[LoadedModel, Path]:
    """Load a folder that ``attnrewrite convert`` has written. Raises VariantError AR310 for any other model."""
    from attnrewrite.conversion import conversion_of

    loaded = load_with_tokenizer(output, model, seq_len)
    if conversion_of(loaded.model) is None or loaded.source is None:
        raise error("AR310", f"{model} carries no conversion", hint="run `attnrewrite convert` first")
    return loaded, loaded.source


def strips(loaded: LoadedModel, text: Path | None, seq_len: int) -> list[dict[str, Any]]:
    """Return the calls of the model on whole strips of the text; of a short text, on all of it."""
    import torch

    from attnrewrite.evaluation import encode, no_cache, read_text

    ids = encode(loaded.tokenizer, read_text(text))
    found = [strip for strip in torch.split(ids, seq_len, dim=1) if strip.shape[1] == seq_len]
    return [{"input_ids": strip, **no_cache(loaded.model)} for strip in found or [ids]]
