"""What runs where the device can run a kernel in none of its configurations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.launch import NoConfigurationError
from attnrewrite.kernels.diagnostics import AttnRewriteWarning, error

T = TypeVar("T")
_REFERENCE: set[frozenset[tuple[str, object]]] = set()
"""Flags of the calls for which the reference runs."""


def on_kernels(call: Call, kernels: Callable[[], T], reference: Callable[[], T], *, again: bool = False) -> T:
    """Return what ``kernels`` does; where that is AR405, warn once, and return what ``reference`` does from then on.

    ``again``: the same weights as in the forward pass are needed. Raises LoweringError AR405 where the forward pass ran
    on kernels with dropout, whose numbers the reference does not draw.
    """
    kind = frozenset({**call.flags(), "dtype": call.query.dtype}.items())
    if kind not in _REFERENCE:
        try:
            return kernels()
        except NoConfigurationError as failure:
            if again and call.how.dropout_p:
                raise error("AR405", f"{failure}, and the forward pass ran on kernels with dropout") from failure
            _REFERENCE.add(kind)
            warnings.warn(
                f"{error('AR405', str(failure))}\n  The reference runs instead.", AttnRewriteWarning, stacklevel=3
            )
    return reference()
