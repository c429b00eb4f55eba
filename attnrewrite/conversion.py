"""Convert: register a variant's parameters on the layers that attend, and mark those layers for the backend."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnrewrite.backend import Backend, globs, resolve
from attnrewrite.decoding import state_layer
from attnrewrite.explanation import capture_model, uncompiled, without_cache
from attnrewrite.kernels.diagnostics import closest, error
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.pipeline import Pipeline, not_applied
from attnrewrite.passes.report import Site
from attnrewrite.passes.rewriting import markers
from attnrewrite.passes.rewriting.enter import enter
from attnrewrite.passes.rewriting.select import matches
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.base import Request
from attnrewrite.variants import VariantConfig
from attnrewrite.verification import compare, outputs

Plan = VariantConfig | str | Mapping[str, VariantConfig | str]


@dataclass
class EnterHook:
    """Forward pre-hook of a converted layer: passes the layer's input and new state through the marker op.

    ``names`` are those of the new parameters and buffers. A plain object without handles, so that a converted model
    can be copied and pickled.
    """

    layer: str
    config: VariantConfig
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        settings = self.config.to_dict()
        self.variant = settings.pop("variant")
        # Written once and not at each call, because Dynamo would have to trace the writing.
        self.paths = [name.split(".") for name in self.names]
        held = self.config.state_names
        states = [(), held, (*held, "position"), (*held, "budget")] if held else [()]
        self.sites = {
            (state, learning): markers.encode(
                self.layer,
                self.variant,
                settings,
                self.names,
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
        state: dict[str, torch.Tensor] = {}
        if self.config.state_names:
            held = state_layer(module, args, kwargs, self.layer)
            state = {} if held is None else held.extend(self.config.new_state(holder, x))
        marked: torch.Tensor = enter(x, [*parameters, *state.values()], self.sites[tuple(state), module.training])
        return marked


@dataclass
class LeaveHook:
    """Forward hook of a converted layer that keeps state in a cache: what the cache need not hold any more goes."""

    layer: str

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let the cache's layer settle."""
        held = state_layer(module, args, kwargs, self.layer)
        if held is not None:
            held.settle()


@dataclass
class MarkedForward:
    """The forward of a converted model that is itself the attention layer.

    torch runs the hooks of a compiled model's outermost module outside the captured graph, so there the marker goes in
    front of ``forward`` and not into a hook.
    """

    hook: EnterHook
    module: torch.nn.Module
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Mark the input, then run the model's own forward."""
        args, kwargs = self.hook(self.module, args, kwargs)
        return self.forward(*args, **kwargs)


def _is_layer_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class Conversion:
    """What a model was converted to: layer path -> config."""

    sites: dict[str, VariantConfig]


def convert(
    model: torch.nn.Module,
    plan: Plan,
    *,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    targets: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    verify: bool = True,
) -> torch.nn.Module:
    """Put a variant and its parameters into ``model``, in place, and return it.

    New parameters become an ordinary submodule of each layer that attends, named after the variant, so ``state_dict``,
    optimizers and ``.to()`` simply work. The model is compiled in place (``inner="eager"``) and can be called, trained
    and saved at once; ``model.compile(backend="attnrewrite")`` replaces that by full compilation.

    plan: one config (or variant name), or globs on layer paths -> config, of which the first that matches is taken.
    example_inputs, example_kwargs: inputs that the model runs on; only their shapes and dtypes matter.
    targets, exclude: globs on layer paths to take or to leave.
    verify: prove every match, run the converted model once on the example inputs, and where the config starts as the
        same function, compare.

    A failed conversion leaves the model exactly as it was.

    Raises:
        CaptureError: AR102, AR104, AR105 for a wrong model or inputs that do not run.
        MatchError: AR201 where the model has no attention, AR205 where a proof fails.
        VariantError: AR301-AR303 for a wrong config, AR305 where the model is converted already, AR306 where targets
            match no layer, AR307 where the variant is not defined, AR311 where a name is taken, AR313 where the
            converted model differs.
    """
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise error("AR102", "model is the result of torch.compile", hint="convert the model itself, then compile it")
    choices = _choices(plan, globs(targets))
    if conversion_of(model) is not None:
        raise error("AR305", f"{type(model).__name__} carries {_describe(model)}")
    kwargs = dict(example_kwargs or {})
    capture = capture_model(model, example_inputs, kwargs)
    chosen = _choose(Pipeline(verify=verify), capture, choices, globs(exclude))
    _check_names(model, chosen)
    expected = _reference(model, example_inputs, kwargs) if verify else None
    try:
        for layer, (config, site) in chosen.items():
            _install(model, layer, config, site)
        compile_in_place(model)
        if expected is not None:
            with without_cache(model, kwargs) as inputs:
                compare(
                    model,
                    example_inputs,
                    inputs,
                    expected,
                    all(c.starts_as_identity for c, _ in chosen.values()),
                )
    except BaseException:
        _remove(model)
        raise
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo ``convert``: remove the markers and the new parameters; the model's own weights are untouched.

    The model is left uncompiled. Raises VariantError AR310 where it carries no conversion.
    """
    if conversion_of(model) is None:
        raise error("AR310", f"{type(model).__name__} carries no conversion")
    _remove(model)
    return model


def conversion_of(model: torch.nn.Module) -> Conversion | None:
    """Return what ``model`` was converted to, or None."""
    sites = {hook.layer: hook.config for _, hook in _hooks(model)}
    return Conversion(sites) if sites else None


def new_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names, as in ``state_dict``, and the parameters that ``convert`` added."""
    for prefix, holder in _holders(model):
        for name, parameter in holder.named_parameters():
            yield prefix + name, parameter


def new_state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names, as in ``state_dict``, and the values of the parameters and buffers that ``convert`` added."""
    for prefix, holder in _holders(model):
        for name, value in holder.state_dict().items():
            yield prefix + name, value


def _holders(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for path, hook in _named_hooks(model):
        if hook.names:
            yield ".".join(filter(None, (path, hook.variant))) + ".", getattr(model.get_submodule(path), hook.variant)


def compile_in_place(model: torch.nn.Module) -> None:
    """Compile a converted model so that it can be called at once.

    A model that is generated with, trained and evaluated meets more kinds of calls than torch's usual limit of eight,
    beyond which torch would run it uncompiled, so the limit is raised, for this model only where torch can.
    """
    known = inspect.signature(torch.compile).parameters
    limits = {"recompile_limit": 64, "isolate_recompiles": True}
    model.compile(
        backend=Backend(inner="eager", strict=True),
        **{name: value for name, value in limits.items() if name in known},
    )


def install(model: torch.nn.Module, layer: str, config: VariantConfig, holder: torch.nn.Module | None) -> None:
    """Register parameters and marker of one layer."""
    owner = model.get_submodule(layer)
    names: tuple[str, ...] = ()
    if holder is not None:
        owner.register_module(config.variant, holder)
        names = tuple(name for name, _ in itertools.chain(holder.named_parameters(), holder.named_buffers()))
    hook = EnterHook(layer, config, names)
    if owner is model:
        model.forward = MarkedForward(hook, model, model.forward)
    else:
        owner.register_forward_pre_hook(hook, with_kwargs=True)
        if config.state_names:
            owner.register_forward_hook(LeaveHook(layer), with_kwargs=True)


def _install(model: torch.nn.Module, layer: str, config: VariantConfig, site: Attention) -> None:
    value = site.output.meta["val"]
    owner = model.get_submodule(layer)
    device = next((p.device for p in owner.parameters()), value.device)
    holder = config.module(site, device, value.dtype) if config.adds_parameters else None
    if holder is not None:
        holder.train(owner.training)
    install(model, layer, config, holder)


def _remove(model: torch.nn.Module) -> None:
    for owner, hook in list(_hooks(model)):
        marked = owner.__dict__.get("forward")
        if isinstance(marked, MarkedForward):
            del owner.forward
            if not inspect.ismethod(marked.forward):  # the model had a forward of its own instance
                owner.forward = marked.forward
        for key, found in list(owner._forward_pre_hooks.items()):
            if found is hook:
                del owner._forward_pre_hooks[key]
                owner._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, leave in list(owner._forward_hooks.items()):
            if isinstance(leave, LeaveHook):
                del owner._forward_hooks[key]
                owner._forward_hooks_with_kwargs.pop(key, None)
        if hook.names:
            delattr(owner, hook.variant)
    model._compiled_call_impl = None


def _hooks(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, EnterHook]]:
    for path, hook in _named_hooks(model):
        yield model.get_submodule(path), hook


def _named_hooks(model: torch.nn.Module) -> Iterator[tuple[str, EnterHook]]:
    marked = model.__dict__.get("forward")
    if isinstance(marked, MarkedForward):
        yield "", marked.hook
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, EnterHook):
                yield path, hook


def _describe(model: torch.nn.Module) -> str:
    found = conversion_of(model)
    assert found is not None
    names = dict.fromkeys(config.variant for config in found.sites.values())
    return f"{', '.join(names)} in {len(found.sites)} layers"


def _choices(plan: Plan, targets: tuple[str, ...]) -> list[tuple[tuple[str, ...], VariantConfig]]:
    if isinstance(plan, Mapping):
        return [((glob,), resolve(config)) for glob, config in plan.items()]
    return [(targets, resolve(plan))]


Chosen = dict[str, tuple[VariantConfig, Attention]]


def _choose(
    pipeline: Pipeline,
    capture: Any,
    choices: list[tuple[tuple[str, ...], VariantConfig]],
    exclude: tuple[str, ...],
) -> Chosen:
    """Pick a config for every site, and check that each can be done."""
    report, found = pipeline.inspect(capture)
    if not report.sites:
        raise error("AR201", f"{len(report.rejections)} softmaxes were found, none of them attention")
    layers = list(dict.fromkeys(row.layer for row in report.sites))
    for patterns, config in choices:
        if not any(matches(layer, patterns) for layer in layers):
            raise error("AR306", f"{' '.join(patterns)} ({config.variant}): {closest(patterns[0], layers)}")
    chosen: Chosen = {}
    failed: list[Site] = []
    sites = dict(enumerate(found.attentions))
    for number, row in enumerate(report.sites):
        wanted = next((c for patterns, c in choices if matches(row.layer, patterns)), None)
        if wanted is None or matches(row.layer, exclude) or wanted.variant == "sdpa":
            continue
        row.variant = wanted.variant
        if number not in sites or not _covers(wanted, sites[number], row):
            failed.append(row)
        else:
            chosen.setdefault(row.layer, (wanted, sites[number]))
    if failed:
        raise not_applied(failed)
    if not chosen:
        raise error("AR306", f"nothing is left to convert among: {', '.join(layers)}")
    return chosen


def _covers(config: VariantConfig, site: Attention, row: Site) -> bool:
    if row.status == "rejected":
        return False
    settings = config.to_dict()
    try:
        RULES[config.variant].check(site, Request(settings.pop("variant"), settings))
    except Reject as reject:
        row.rejections.append(reject.rejection(row.layer, row.source))
        return False
    return True


def _check_names(model: torch.nn.Module, chosen: Chosen) -> None:
    for layer, (config, _) in chosen.items():
        if config.adds_parameters and hasattr(model.get_submodule(layer), config.variant):
            raise error("AR311", f"the layer has an attribute {config.variant!r}", layer=layer)


def _reference(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    with uncompiled(model), without_cache(model, kwargs) as inputs:
        return outputs(model, args, inputs)
