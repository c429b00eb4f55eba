"""Calibrate: set the state of a converted model from real inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnrewrite.conversion import converted_layers
from attnrewrite.kernels.diagnostics import error
from attnrewrite.observation import Batch, Observed, observe
from attnrewrite.variants.base import Calibrator

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Calibration:
    """What was measured: one row of plain data per layer and head; ``print`` it with rich for a table."""

    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"rows": self.rows}

    def __rich__(self) -> Table:
        """Return the table without what is a list of numbers itself."""
        from rich.table import Table

        names = [name for name, value in self.rows[0].items() if not isinstance(value, list)]
        table = Table(*names, box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for row in self.rows:
            cells = (row[name] for name in names)
            table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
        return table


def calibrate(model: torch.nn.Module, batches: Iterable[Batch], *, seed: int = 0) -> Calibration:
    """Set what a converted model learns from its inputs, and measure what becomes of its attention.

    The model runs on the batches twice, in eval mode and as it was before the conversion. The same seed and batches
    give the same state on the same device. A failed calibration leaves the model exactly as it was.

    batches: each one the model's input, a sequence of its inputs, or a mapping of its keyword arguments. Some dozens of
        sequences of real data.
    seed: of the samples and of the clustering.

    Raises:
        VariantError: AR310 where the model is not converted, AR316 where there is nothing to calibrate.
        LoweringError: AR402 where the model's activations are not finite.
    """
    layers, calibrators = converted_layers(model), dict[str, Calibrator]()
    for layer, (config, holder) in layers.items():
        calibrator = None if holder is None else config.calibrator(layer, holder)
        if calibrator is not None:
            calibrators[layer] = calibrator
    if not calibrators:
        raise error("AR316", f"none of its {len(layers)} converted layers is set from its inputs")
    calls = list(batches)
    generator = torch.Generator().manual_seed(seed)

    def collect(at: Observed) -> None:
        if at.request.layer in calibrators:
            calibrators[at.request.layer].collect(at, 1 / len(calls), generator)

    def measure(at: Observed) -> None:
        if at.request.layer in calibrators:
            calibrators[at.request.layer].measure(at)

    observe(model, calls, collect)
    _check_seen(calibrators)
    with torch.no_grad():
        for calibrator in calibrators.values():
            calibrator.fit(generator)
        observe(model, calls, measure)
        for calibrator in calibrators.values():
            calibrator.apply()
    return Calibration([row for calibrator in calibrators.values() for row in calibrator.rows()])


def _check_seen(calibrators: dict[str, Calibrator]) -> None:
    for layer, calibrator in calibrators.items():
        if not calibrator.seen:
            raise error("AR316", "no batch ran this layer", layer=layer)


def update(model: torch.nn.Module) -> None:
    """Move what the layers of a converted model learn apart from gradients; call it after each optimizer step.

    Routing: the centroids follow what was routed since the last call, in all processes together where
    ``torch.distributed`` is initialised. Selective with ``mode="ramp"``: the votes count a little more. Layers that saw
    nothing, and variants without such state, stay as they are.

    Raises VariantError AR310 where the model is not converted.
    """
    with torch.no_grad():
        for layer, (config, holder) in converted_layers(model).items():
            if holder is not None:
                config.update(layer, holder)
