"""The way back: a rewritten graph as an exported program again."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputSpec
from torch.utils import _pytree as pytree

from attnrewrite.passes.attention.regions import is_mode_switch
from attnrewrite.passes.graph.capture import Capture


def to_program(capture: Capture, program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with the graph of ``capture``, which began as a copy of its own and has its inputs.

    Outputs of classes that are mappings, as transformers returns them, become plain dicts: a file with such a class
    could be loaded only where the class is known.
    """
    signature, calls = program.graph_signature, copy.deepcopy(program.module_call_graph)
    whole = calls[0].signature
    assert whole is not None  # torch keeps that of the outermost module
    whole.out_spec = _plain(whole.out_spec)
    for node in filter(is_mode_switch, capture.module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            capture.module.graph.erase_node(node)  # the program is for inference
        node.meta.setdefault("val", None)  # an exported program says what every node gives
    results = capture.module.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    specs = [_at(spec, result) for spec, result in zip(signature.output_specs, results, strict=True)]
    return ExportedProgram(
        root=capture.module,
        graph=capture.module.graph,
        graph_signature=dataclasses.replace(signature, output_specs=specs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _at(spec: OutputSpec, result: Any) -> OutputSpec:
    """Let an output's description name the node that now gives it."""
    if isinstance(spec.arg, ConstantArgument) or not isinstance(result, fx.Node):
        return spec
    return dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=result.name))


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return the structure with a dict in the place of every other mapping."""
    if spec.is_leaf():
        return spec
    children = [_plain(child) for child in spec.children()]
    kind, context = spec.type, spec.context
    if issubclass(kind, Mapping) and kind not in (dict, OrderedDict, defaultdict):
        one = pytree.SUPPORTED_NODES[kind].unflatten_fn(list(range(len(children))), context)
        kind, context = dict, sorted(one, key=one.__getitem__)
    return pytree.TreeSpec(kind, context, children)
