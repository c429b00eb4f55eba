"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrewrite.kernels.diagnostics import error


@dataclass(frozen=True)
class Evaluation:
    """Mean next-token loss in nats over ``tokens`` predictions, and its exponential."""

    perplexity: float
    loss: float
    tokens: int
    seconds: float


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    seq_len: int,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Measure ``model`` on ``token_ids`` [1, N] in strips of ``seq_len`` tokens that do not overlap.

    Every token but the first of a strip is predicted from those before it in the strip. The loss is taken
    in float32; the model keeps its train or eval mode. ``progress`` is told how many tokens are done.
    Raises AR102 when there is nothing to predict.
    """
    count = token_ids.shape[-1]
    if count < 2 or seq_len < 2:
        raise error("AR102", f"{count} tokens in strips of {seq_len}: at least 2 are needed to predict one")
    training, start = model.training, time.perf_counter()
    total, predicted = 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, count - 1, seq_len):
                strip = token_ids[:, first : first + seq_len]
                if strip.shape[1] > 1:
                    total += float(strip_loss(model, strip)) * (strip.shape[1] - 1)
                    predicted += strip.shape[1] - 1
                if progress is not None:
                    progress(min(first + seq_len, count))
    finally:
        model.train(training)
    loss = total / predicted
    return Evaluation(math.exp(min(loss, 700.0)), loss, predicted, time.perf_counter() - start)


def strip_loss(model: nn.Module, strip: Tensor) -> Tensor:
    """Return the mean loss of predicting ``strip`` [B, L] from itself, in float32."""
    result: Any = model(strip, **no_cache(model))
    logits: Tensor = getattr(result, "logits", result)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), strip[:, 1:].flatten())


def no_cache(model: nn.Module) -> dict[str, Any]:
    """Return the keyword that switches the key-value cache off, for a model that has one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def encode(tokenizer: Any, text: str) -> Tensor:
    """Turn ``text`` into token ids [1, N]; a text longer than the model's context is no mistake here."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    return ids


def read_text(path: Path | None = None) -> str:
    """Read a UTF-8 text; without a path the one that ships with this library. Raises AR602."""
    if path is None:
        return resources.files("attnrewrite").joinpath("data", "lamplighter.txt").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error("AR602", f"{path} cannot be read as a UTF-8 text: {cause}") from cause
