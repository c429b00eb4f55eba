"""The memory loss of selective attention: how much of a context the layers of a converted model still need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrewrite.conversion import converted_layers
from attnrewrite.kernels.diagnostics import error
from attnrewrite.observation import Observed, observed
from attnrewrite.passes.rules.selective import needed_keys
from attnrewrite.passes.rules.selective_ssa import with_temperatures
from attnrewrite.variants import SelectiveConfig


class MemoryLoss:
    """Runs a model whose layers are converted to selective attention, and returns its memory loss beside its output.

    Add a part of the loss to the model's own, and training makes keys that are not needed go (arXiv 2410.02703)::

        run = MemoryLoss(model)
        output, memory = run(input_ids=ids, labels=ids)
        (output.loss + 0.1 * memory).backward()

    With M[i] the number of keys that query i of a layer still needs, by a soft count (``functional.selective_memory``),
    the loss is the mean over layers and sequences of ``max_i M[i] / N``, where N counts the real tokens of the
    sequence; without votes, window and documents it is 1. Weights from 0.02 to 0.1 are usual.

    The model runs uncompiled and without a key-value cache, in the mode it is in, and with gradients if enabled.

    Args:
        model: a converted model.
        tau: the penalty at which a key counts as no longer needed.

    Raises:
        VariantError: AR310 where the model is not converted, AR324 where no layer has selective attention.
        LoweringError: AR402 for a ``tau`` that is not positive, when the model is called.
    """

    def __init__(self, model: torch.nn.Module, *, tau: float = 1.0) -> None:
        layers = converted_layers(model)
        if not any(isinstance(config, SelectiveConfig) for config, _ in layers.values()):
            raise error("AR324", f"none of its {len(layers)} converted layers")
        self.tau = tau
        self._shares: list[Tensor] = []
        self._run = observed(model, self._see, converted=True)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Return the model's output for these inputs, and the loss, a number."""
        self._shares.clear()
        output = self._run(*args, **kwargs)
        if not self._shares:
            raise error("AR324", "the inputs reached none of them")
        found = torch.stack([share.to(self._shares[0].device) for share in self._shares]).mean()
        self._shares.clear()
        return output, found

    def _see(self, at: Observed) -> None:
        if at.request.variant not in ("selective", "selective_ssa"):
            return
        t = with_temperatures(at.tensors, at.request) if at.request.variant == "selective_ssa" else at.tensors
        needed = needed_keys(t, at.request, self.tau)  # [B, L]
        tokens = (needed > 0).sum(-1).clamp(min=1)  # a query that sees no key needs none
        self._shares.append((needed.max(-1).values / tokens).mean())
