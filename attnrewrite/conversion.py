"""Convert: register a variant's parameters on the layers that attend, and mark those layers for the backend."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnrewrite.backend import globs
from attnrewrite.choice import Plan, check_names, choose, swaps, wishes
from attnrewrite.compiled import compile_in_place, leave_uncompiled, uncompiled
from attnrewrite.distances import Distance, distance_from, record
from attnrewrite.explanation import capture_model, without_cache
from attnrewrite.hooks import EnterHook, LeaveHook, MarkedForward
from attnrewrite.kernels.diagnostics import error
from attnrewrite.observation import Call
from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.variants import Swap, VariantConfig
from attnrewrite.verification import compare, outputs

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


@dataclass(frozen=True)
class Conversion:
    """What a model was converted to: layer path -> config; and what is known of the modules that were replaced.

    ``distance`` is how far the model was from the original on the example inputs when it was converted; None where it
    started as the same function, waits for its calibration, was not verified, or was loaded.
    """

    sites: dict[str, VariantConfig]
    details: dict[str, dict[str, Any]]
    distance: Distance | None = field(default=None, compare=False)


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
    example_inputs, example_kwargs: inputs that the model runs on; their values matter only where they are measured.
    targets, exclude: globs on layer paths to take or to leave.
    verify: prove every match, run the converted model on the example inputs, and compare it with the original. Where
        the config starts as the same function, outputs must agree; else ``conversion_of(model).distance`` tells how far
        they are apart.

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
    wanted = wishes(plan, globs(targets))
    if conversion_of(model) is not None:
        raise error("AR305", f"{type(model).__name__} carries {_describe(model)}")
    kwargs = dict(example_kwargs or {})
    capture = capture_model(model, example_inputs, kwargs)
    chosen = choose(Pipeline(verify=verify), capture, wanted, globs(exclude))
    check_names(model, chosen)
    replaced = swaps(model, capture, chosen, lambda: _reference(model, example_inputs, kwargs))
    configs = [config for config, _, _ in chosen.values()]
    same = all(config.starts_as_identity for config in configs)
    expected = _reference(model, example_inputs, kwargs) if verify and same else None
    # What learns from inputs is nothing yet.
    measured = verify and not same and not any(config.learns_from_inputs for config in configs)
    before = record(model, Call(tuple(example_inputs), kwargs)) if measured else None
    try:
        for layer, (config, site, _) in chosen.items():
            if not config.swaps_modules:
                _install(model, layer, config, site)
            elif layer in replaced:
                install(model, layer, config, None, replaced[layer])
        compile_in_place(model)
        if verify:
            with without_cache(model, kwargs) as inputs:
                compare(model, example_inputs, inputs, expected)
        if before is not None:
            found = distance_from([before], model)
            for _, hook in layer_hooks(model):
                hook.distance = found
    except BaseException:
        _remove(model)
        raise
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo ``convert``: remove the markers and the new parameters, bring replaced modules back.

    The model's own weights are untouched, and it is left uncompiled.

    Raises:
        VariantError: AR310 where it carries no conversion, AR322 where it was loaded without the replaced weights.
    """
    converted_layers(model)  # raises where there are none
    for _, hook in layer_hooks(model):
        gone = [path for path, old in hook.originals.items() if any(p.is_meta for p in old.parameters())]
        if gone and not any(p.is_meta for p in model.parameters()):
            raise error("AR322", f"{gone[0]} was loaded without the weights it had before", layer=hook.layer)
    _remove(model)
    return model


def conversion_of(model: torch.nn.Module) -> Conversion | None:
    """Return what ``model`` was converted to, or None."""
    hooks = [hook for _, hook in layer_hooks(model)]
    if not hooks:
        return None
    details = {hook.layer: hook.details for hook in hooks if hook.details}
    return Conversion({hook.layer: hook.config for hook in hooks}, details, hooks[0].distance)


def fit_errors(model: torch.nn.Module) -> dict[str, dict[str, list[float] | None]]:
    """Return how far each layer with a fitted projection was from the original's scores, by layer path.

    ``"frobenius"`` holds the relative error of every query head; ``"weighted"`` the same in the norm of the inputs'
    covariance, None where the fit had no data.
    """
    found = conversion_of(model)
    return {} if found is None else {layer: x["errors"] for layer, x in found.details.items() if "errors" in x}


def original_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and parameters that the model had before its conversion."""
    added = {name for name, _ in new_parameters(model)}
    for name, parameter in model.named_parameters():
        if name not in added:
            yield name, parameter
    for path, hook in _named_hooks(model):
        for place, old in hook.originals.items():
            for name, parameter in old.named_parameters():
                yield f"{_place(path, hook, place)}.{name}", parameter


def converted_layers(model: torch.nn.Module) -> dict[str, tuple[VariantConfig, torch.nn.Module | None]]:
    """Return each converted layer's config, and the module of its new state if it has one.

    Raises VariantError AR310 where the model carries no conversion.
    """
    found = {
        hook.layer: (hook.config, getattr(owner, hook.variant) if hook.names else None)
        for owner, hook in layer_hooks(model)
    }
    if not found:
        raise error("AR310", f"{type(model).__name__} carries no conversion")
    return found


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
        for place in (_place(path, hook, x) for x in hook.originals):
            yield place + ".", model.get_submodule(place)


def _place(path: str, hook: EnterHook, place: str) -> str:
    """Return the path of a replaced module in a model that the converted one may by now be a part of."""
    return path.removesuffix(hook.layer) + place


def install(
    model: torch.nn.Module,
    layer: str,
    config: VariantConfig,
    holder: torch.nn.Module | None,
    swap: Swap | None = None,
) -> None:
    """Register parameters and marker of one layer, and replace its modules."""
    owner = model.get_submodule(layer)
    names: tuple[str, ...] = ()
    if holder is not None:
        owner.register_module(config.variant, holder)
        names = tuple(name for name, _ in itertools.chain(holder.named_parameters(), holder.named_buffers()))
    swap = swap or Swap({})
    originals = {path: model.get_submodule(path) for path in swap.modules}
    if config.learns_from_inputs:
        # Each process has sums of its own until attnrewrite.update: DistributedDataParallel must not copy them.
        prefix = ".".join(filter(None, (layer, config.variant)))
        model.__dict__.setdefault(_DDP_IGNORES, []).extend(f"{prefix}.{name}" for name in names)
    hook = EnterHook(layer, config, names, originals, {**swap.details, "modules": list(originals)} if originals else {})
    if owner is model:
        model.forward = MarkedForward(hook, model, model.forward)
    else:
        owner.register_forward_pre_hook(hook, with_kwargs=True)
        if config.state_names or config.adds_to_output:
            owner.register_forward_hook(LeaveHook(hook), with_kwargs=True)
    for path, module in swap.modules.items():
        model.set_submodule(path, module)


def _install(model: torch.nn.Module, layer: str, config: VariantConfig, site: Attention) -> None:
    value = site.output.meta["val"]
    owner = model.get_submodule(layer)
    device = next((p.device for p in owner.parameters()), value.device)
    holder = config.module(site, device, value.dtype) if config.adds_parameters else None
    if holder is not None:
        holder.train(owner.training)
    install(model, layer, config, holder)


def _remove(model: torch.nn.Module) -> None:
    added = tuple(prefix for prefix, _ in _holders(model))
    ignored = [name for name in model.__dict__.pop(_DDP_IGNORES, ()) if not name.startswith(added)]
    if ignored:  # the user's own
        model.__dict__[_DDP_IGNORES] = ignored
    for path, hook in list(_named_hooks(model)):
        owner = model.get_submodule(path)
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
        _bring_back(model, {_place(path, hook, place): old for place, old in hook.originals.items()})
    leave_uncompiled(model)


def _bring_back(model: torch.nn.Module, originals: Mapping[str, torch.nn.Module]) -> None:
    """Put replaced modules in their places again, on the device and in the dtype that the model has by now."""
    replaced = [model.get_submodule(path) for path in originals]
    like = next((p for module in replaced for p in module.parameters()), None)
    for (path, old), new in zip(originals.items(), replaced, strict=True):
        old.train(new.training)
        model.set_submodule(path, old if like is None else old.to(like.device, like.dtype))


def layer_hooks(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, EnterHook]]:
    """Yield the layers that are converted, each with the hook that passes its parameters and state on."""
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


def _reference(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    with uncompiled(model), without_cache(model, kwargs) as inputs:
        return outputs(model, args, inputs)
