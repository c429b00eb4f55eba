"""Capture: one vocabulary for every entry, pre-dispatch ATen, with layer paths and source lines kept.

A Dynamo graph is traced again under its own fake mode; torch.export gives the same vocabulary. Below autograd, softmax
and fused attention are already taken apart, so nothing is matched there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from attnrewrite.kernels.diagnostics import error
from attnrewrite.passes.graph import fastpath, flex, modes
from attnrewrite.passes.graph.nodes import NAME, NUMBER, WEIGHT, is_weight, source_line

Entry = Literal["dynamo", "export"]

_CONTEXT = "_checkpoint_context_fn"


@dataclass(eq=False, repr=False)
class Capture:
    """A captured graph.

    ``buffers`` maps placeholders that are the model's buffers to their values; ``bindings`` maps placeholders of inner
    bodies (activation checkpointing) to the values that the outer graph passes; ``entry`` says where it came from.
    """

    module: fx.GraphModule
    entry: Entry
    buffers: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    bindings: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def graphs(self) -> list[fx.GraphModule]:
        """Return the outer graph and every body below it."""
        found, todo = list[fx.GraphModule](), [self.module]
        while todo:
            module = todo.pop(0)
            found.append(module)
            todo += [body for _, body in bodies(module)]
        return found


def bodies(module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Yield the calls of higher-order operators in ``module`` with the graph that each one runs."""
    for node in module.graph.nodes:
        for _, body in _body_arguments(node):
            yield node, body


def _body_arguments(node: fx.Node) -> Iterator[tuple[int, fx.GraphModule]]:
    for position, arg in enumerate(node.args if node.op == "call_function" else ()):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            body = getattr(node.graph.owning_module, str(arg.target), None)
            if isinstance(body, fx.GraphModule):
                yield position, body


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Capture:
    """Trace a Dynamo graph again into pre-dispatch ATen; placeholders keep their order."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    gm = flex.simplified(gm)
    _check_transforms(gm)
    fakes = [node.meta["example_value"] for node in placeholders]
    mode = _fake_mode(fakes)
    with mode or nullcontext(), preserve_node_meta(), _checkpoints_without_context(gm):
        module = make_fx(fx.Interpreter(gm).run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
            *fakes
        )
    _forget_contexts(module)
    module.meta.update(gm.meta)
    capture = Capture(module, "dynamo")
    fresh = module.graph.find_nodes(op="placeholder")
    for old, new, real in zip(placeholders, fresh, example_inputs, strict=True):
        source = getattr(old, "_dynamo_source", None)
        if source is not None:
            new._dynamo_source = source
        new.meta.update({k: v for k, v in old.meta.items() if k not in new.meta})
        new.meta.setdefault("val", old.meta["example_value"])
        if isinstance(real, torch.Tensor) and _is_buffer(old, real):
            capture.buffers[new] = real
        if new in capture.buffers or isinstance(real, torch.nn.Parameter):
            new.meta[WEIGHT] = True
    _prepare(capture)
    return capture


def from_program(program: torch.export.ExportedProgram) -> Capture:
    """Take a copy of the graph of an exported program; nothing is traced again."""
    places: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, places))
    capture = Capture(fx.GraphModule(program.graph_module, graph), "export")
    signature = program.graph_signature
    held = {**program.state_dict, **program.constants}
    weights, constants = signature.inputs_to_parameters, signature.inputs_to_lifted_tensor_constants
    names = {**weights, **signature.inputs_to_buffers, **constants}
    mutated = set(signature.buffers_to_mutate.values())
    for given in program.graph.find_nodes(op="placeholder"):
        node, name = places[given], names.get(given.name)
        if name is None:
            continue
        value = held.get(name)
        node.meta |= {WEIGHT: True} if given.name in constants else {WEIGHT: True, NAME: name}
        if given.name in constants and isinstance(value, torch.Tensor) and value.numel() == 1:
            node.meta[NUMBER] = float(value)
        if given.name not in weights and name not in mutated and isinstance(value, torch.Tensor):
            capture.buffers[node] = value
    modes.write_out(capture.module)
    _prepare(capture)
    return capture


def _check_transforms(gm: fx.GraphModule) -> None:
    """Refuse vmap, grad and their kin: traced again, what they wrap would become a constant."""
    for node in gm.graph.nodes:
        if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
            masks = ": it makes a block mask for flex_attention" if any(map(flex.is_flex, gm.graph.nodes)) else ""
            hint = "make the block mask outside of the model" if masks else None
            detail = f"the graph calls {node.target.__name__}{masks}"
            raise error("AR107", detail, source=source_line(node), hint=hint)


def _fake_mode(values: Sequence[Any]) -> FakeTensorMode | None:
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def _is_buffer(node: fx.Node, value: torch.Tensor) -> bool:
    source = getattr(node, "_dynamo_source", None)
    name = source.name if source is not None else ""
    return not isinstance(value, torch.nn.Parameter) and "_buffers" in str(name() if callable(name) else name)


@contextmanager
def _checkpoints_without_context(gm: fx.GraphModule) -> Iterator[None]:
    """Give plain checkpoint bodies the context that torch assumes for them: its pre-dispatch trace asks for one."""
    from torch._higher_order_ops import wrap
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    policy = getattr(wrap, "_always_prefer_recompute", None)
    default = functools.partial(create_selective_checkpoint_contexts, policy)
    added = []
    for module in gm.modules():
        if isinstance(module, fx.GraphModule) and _CONTEXT not in module.meta and _has_checkpoint(gm):
            module.meta[_CONTEXT] = default
            added.append(module)
    silent = mock.patch.object(wrap, "warning_once", lambda *_: None, create=True)
    with silent if added else nullcontext():  # it would warn of a context that the user never gave
        try:
            yield
        finally:
            for module in added:
                module.meta.pop(_CONTEXT, None)


def _has_checkpoint(gm: fx.GraphModule) -> bool:
    return any(
        node.target is tag_activation_checkpoint
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def _forget_contexts(module: fx.GraphModule) -> None:
    for inner in module.modules():
        context = getattr(inner, "meta", {}).get(_CONTEXT)
        if isinstance(context, functools.partial) and getattr(context.args[0], "__name__", "").startswith("_always"):
            inner.meta.pop(_CONTEXT)  # type: ignore[union-attr, operator]  # a GraphModule: it has meta


def _read_after_write(graph: fx.Graph) -> None:
    """Let what is read after a write in place be read from the write's result: it is the same memory.

    ``scores.masked_fill_(mask, x)`` as a statement of its own leaves ``scores`` the old node, with new values.
    """
    order = {node: n for n, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        base = node.args[0] if node.args else None
        if schema is None or not isinstance(base, fx.Node) or not schema.returns or not schema.arguments:
            continue
        written, returned = schema.arguments[0].alias_info, schema.returns[0].alias_info
        if written is not None and written.is_write and returned is not None and returned.is_write:
            for user in [user for user in base.users if order[user] > order[node]]:
                user.replace_input_with(base, node)


def _prepare(capture: Capture) -> None:
    """Bring every graph into the form that the matcher reads.

    The placeholders of bodies are connected to what the outer graphs pass: the arguments behind the body.
    """
    for module in capture.graphs():
        flex.simplify(module)
        fastpath.expand(module)
        _read_after_write(module.graph)
        for call in module.graph.nodes:
            for position, body in _body_arguments(call):
                placeholders = body.graph.find_nodes(op="placeholder")
                for inner, value in zip(placeholders, call.args[position + 1 :], strict=False):
                    if isinstance(value, fx.Node):
                        capture.bindings[inner] = value
                        inner.meta |= {WEIGHT: True} if is_weight(value) else {}
