"""Hooks: how a converted layer passes its new parameters and state to the backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attnrewrite.decoding import state_layer
from attnrewrite.kernels.diagnostics import error
from attnrewrite.passes.rewriting import markers
from attnrewrite.passes.rewriting.enter import enter
from attnrewrite.variants import VariantConfig

if TYPE_CHECKING:
    from attnrewrite.distances import Distance


@dataclass
class EnterHook:
    """Forward pre-hook of a converted layer: passes the layer's input and new state through the marker op.

    ``names`` are those of the new parameters and buffers. ``originals`` are the modules that were replaced, by path,
    and ``details`` what the replacement is; ``distance`` is that of the whole model when it was converted. ``added``
    is, while the layer runs, what its output gets added. ``drafts`` says that caches are to take back tokens of several
    calls. A plain object without handles, so that a converted model can be copied and pickled.
    """

    layer: str
    config: VariantConfig
    names: tuple[str, ...]
    originals: dict[str, torch.nn.Module] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    distance: Distance | None = None
    added: torch.Tensor | None = None
    drafts: bool = False

    def __post_init__(self) -> None:
        settings = self.config.to_dict()
        self.variant = settings.pop("variant")
        # Written once and not at each call, because Dynamo would have to trace the writing.
        self.paths = [name.split(".") for name in self.names]
        names = (*self.names, "added") if self.config.adds_to_output else self.names
        held, summary = self.config.state_names, self.config.summary_names
        after = (*(f"{name}_after" for name in self.config.summed_state), *self.config.draft_names)
        more = dict.fromkeys(((), ("position",), ("budget",), ("budget_in_place",), after))
        states = [(), *((*held, *x, *summary) for x in more if held)]
        self.sites = {
            (state, learning): markers.encode(
                self.layer,
                self.variant,
                settings,
                names,
                state,
                learning=learning and self.config.learns_from_inputs,
            )
            for state in states
            for learning in (False, True)
        }

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the first floating-point tensor among the inputs by the marker's result."""
        for index, value in enumerate(args):
            if _is_layer_input(value):
                marked = self._enter(module, value, args, kwargs)
                return (*args[:index], marked, *args[index + 1 :]), kwargs
        for key, value in kwargs.items():
            if _is_layer_input(value):
                return args, {**kwargs, key: self._enter(module, value, args, kwargs)}
        raise error("AR309", "the layer was called without a floating-point tensor", layer=self.layer)

    def _enter(
        self, module: torch.nn.Module, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        holder = getattr(module, self.variant, None)
        parameters = [functools.reduce(getattr, path, holder) for path in self.paths]
        if self.config.adds_to_output:
            self.added = torch.zeros_like(x)
            parameters.append(self.added)
        state: dict[str, torch.Tensor] = {}
        if self.config.state_names:
            held = state_layer(module, args, kwargs, self)
            fresh = {} if held is None else self.config.new_state(holder, x)
            if fresh:
                state = held.extend(fresh, self.config.summed_state)
                if (room := held.room(x.shape[1])) and self.config.draft_names:
                    state |= held.draft(self.config.new_drafts(holder, x, room), room)
                state |= held.summarize(self.config.new_summary(holder, x))
        marked: torch.Tensor = enter(x, [*parameters, *state.values()], self.sites[tuple(state), module.training])
        return marked


@dataclass
class LeaveHook:
    """Forward hook of a converted layer: what a cache need not hold any more goes, what the output gets is added."""

    enter: EnterHook

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Let the cache's layer settle; return the output."""
        if self.enter.config.state_names:
            held = state_layer(module, args, kwargs, self.enter)
            if held is not None:
                held.settle()
        return self.leave(output)

    def leave(self, output: Any) -> Any:
        """Add to the output's first tensor what is to be added. Raises VariantError AR307 where it does not fit."""
        added, self.enter.added = self.enter.added, None
        if added is None:
            return output
        several = isinstance(output, tuple)
        first = output[0] if several else output
        if not isinstance(first, torch.Tensor) or first.shape != added.shape:
            found = list(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
            detail = f"the layer returns {found}; needed is a tensor of the shape of its input, {list(added.shape)}"
            raise error("AR307", detail, layer=self.enter.layer)
        total = first + added.to(first.dtype)
        return (total, *output[1:]) if several else total


@dataclass
class MarkedForward:
    """The forward of a converted model that is itself the attention layer.

    torch runs the hooks of a compiled model's outermost module outside the captured graph, so there the marker goes in
    front of ``forward`` and not into a hook.
    """

    hook: EnterHook
    module: torch.nn.Module
    forward: Callable[..., Any]

    @property
    def __code__(self) -> Any:
        """That of the model's own forward: torch.export looks where a forward was written."""
        return self.forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Mark the input, run the model's own forward, and add what is to be added."""
        args, kwargs = self.hook(self.module, args, kwargs)
        return LeaveHook(self.hook).leave(self.forward(*args, **kwargs))


def _is_layer_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
