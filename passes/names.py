"""The names that weights have in the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.capture import Capture
from attnrewrite.passes.graph import clean_path

NAME = "attnrewrite_name"
"""Meta key of the placeholders whose qualified name in the model is known."""

_HELD = re.compile(r"\._(?:parameters|buffers)\['(.+?)'\]")


def name_weights(capture: Capture, program: torch.export.ExportedProgram) -> None:
    """Note on the placeholders of ``capture`` which parameter or buffer of the model each one is."""
    signature = program.graph_signature
    names: Mapping[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given = program.graph.find_nodes(op="placeholder")
    for old, new in zip(given, capture.module.graph.find_nodes(op="placeholder"), strict=True):
        if old.name in names:
            new.meta[NAME] = names[old.name]


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
    return clean_path(_HELD.sub(r".\1", name)) if name else None
