"""The names that weights have in the model."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.nodes import NAME, clean_path

_HELD = r"\._(?:parameters|buffers)\['(.+?)'\]"


def weight_name(node: fx.Node | None, capture: Capture) -> str | None:
    """Return the qualified name of the weight whose placeholder is ``node``, or None."""
    while node is not None and node in capture.bindings:
        node = capture.bindings[node]
    if node is None:
        return None
    if node.op == "get_attr" or NAME in node.meta:
        return str(node.meta.get(NAME, node.target))
    source: Any = getattr(getattr(node, "_dynamo_source", None), "name", None)
    name = source() if callable(source) else source
    return clean_path(re.sub(_HELD, r".\1", name)) if name else None
