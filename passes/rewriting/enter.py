"""The operator ``attnrewrite::enter``, which carries new parameters into the graph; see ``markers.py``.

Defined on import, apart from what reads the marker: most processes never convert a model, and to define an operator
costs more than to import all the passes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from attnrewrite.kernels.diagnostics import error
from attnrewrite.passes.rewriting.markers import ENTER


@torch.library.custom_op(ENTER, mutates_args=())
def _enter(x: torch.Tensor, params: Sequence[torch.Tensor], site: str) -> torch.Tensor:
    """Mark that the layer with input ``x`` attends as ``site`` says, with the new parameters ``params``."""
    what = json.loads(site)
    raise error(
        "AR308",
        f"the layer was converted to {what['variant']}, and its marker was executed",
        layer=what["layer"],
    )


@_enter.register_fake
def _(x: torch.Tensor, params: Sequence[torch.Tensor], site: str) -> torch.Tensor:
    return torch.empty_like(x)


enter = torch.ops.attnrewrite.enter
"""The operator, in the form that tracers read."""
