"""From a fitted layer to the modules that take the places of its projections, with their values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnrewrite.kernels.symmetric.layer import Projections, SharedLayer
from attnrewrite.passes.facts.heads import HeadRows
from attnrewrite.passes.report import Site
from attnrewrite.variants.base import Swap
from attnrewrite.variants.shared_modules import Sharing, as_weight, empty_modules, weight_of

if TYPE_CHECKING:
    from attnrewrite.variants.symmetric import SymmetricConfig


@dataclass(frozen=True, eq=False)
class Layer:
    """The projections of one layer that can be shared."""

    row: Site
    query: HeadRows
    key: HeadRows
    projections: Projections

    @property
    def fused(self) -> bool:
        """Whether one module makes queries and keys."""
        return self.query.module == self.key.module


def swap_of(config: SymmetricConfig, model: nn.Module, layer: Layer, fitted: SharedLayer) -> Swap:
    """Return what takes the places of the layer's projections."""
    old = model.get_submodule(layer.key.module)
    sharing = _sharing(config, old, layer, fitted)
    modules = empty_modules(model, sharing)
    state = _fused_state(old, layer, fitted) if layer.fused else _separate_state(old, layer, fitted, sharing)
    weight = weight_of(old)
    for path, module in modules.items():
        pair = {} if fitted.pair is None or path != sharing.query else {"pair": _stored(config, fitted.pair)}
        values = {name: x.to(weight.device) for name, x in {**state[path], **pair}.items()}
        values = {name: x.to(weight.dtype) if x.is_floating_point() else x for name, x in values.items()}
        module.load_state_dict(values, assign=True)
        module.train(old.training)
    errors = {"frobenius": fitted.errors, "weighted": fitted.weighted}
    return Swap(modules, {**asdict(sharing), "errors": errors})


def _sharing(config: SymmetricConfig, old: nn.Module, layer: Layer, fitted: SharedLayer) -> Sharing:
    (H, D), Hkv = layer.query.rows.shape, layer.key.rows.shape[0]
    theirs = layer.projections
    same_bias = fitted.bias is None or (theirs.key_bias is not None and torch.equal(fitted.bias, theirs.key_bias))
    new_key = not torch.equal(fitted.weight, theirs.key) or not same_bias
    whole = layer.key.rows.numel() == weight_of(old).shape[0]
    return Sharing(
        layer.query.module,
        layer.key.module,
        H,
        Hkv,
        D,
        form=None if config.form == "symmetric" else config.pair_form,
        new_key=new_key,
        bias=isinstance(old.bias, Tensor) or fitted.bias is not None,
        rows=not layer.fused and not (whole and _in_order(layer.key.rows)),
        order=not _in_order(_places(old, layer) if layer.fused else layer.query.rows),
    )


def _stored(config: SymmetricConfig, pair: Tensor) -> Tensor:
    return pair.diagonal(dim1=-2, dim2=-1).contiguous() if config.pair_form == "diag" else pair


def _separate_state(
    old: nn.Module, layer: Layer, fitted: SharedLayer, sharing: Sharing
) -> dict[str, dict[str, Tensor]]:
    """Return the values of the modules that take the places of queries and keys, but for ``pair``."""
    rows, query = layer.key.rows.flatten(), dict[str, Tensor]()
    if sharing.rows:
        query["rows"] = rows
    if sharing.order:
        query["order"] = layer.query.rows.flatten().argsort()
    weight, bias = weight_of(old).double().clone(), _bias_of(old)
    weight[rows], bias[rows] = _by_rows(fitted.weight, fitted.bias)
    values = {"weight": as_weight(old, weight), **({"bias": bias} if sharing.bias else {})}
    return {layer.query.module: query, layer.key.module: values}


def _fused_state(old: nn.Module, layer: Layer, fitted: SharedLayer) -> dict[str, dict[str, Tensor]]:
    rest = _rest(old, layer)
    weight, bias = _by_rows(fitted.weight, fitted.bias)
    weight = torch.cat((weight, weight_of(old)[rest].double()))
    bias = torch.cat((bias, _bias_of(old)[rest]))
    values = {"proj.weight": as_weight(old, weight), **({"proj.bias": bias} if isinstance(old.bias, Tensor) else {})}
    places = _places(old, layer)
    return {layer.key.module: {**values, **({} if _in_order(places) else {"order": places.argsort()})}}


def _by_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weight ``[heads, D, d]`` and bias of heads as rows of a linear layer."""
    rows = weight.mT.flatten(0, 1)
    return rows, rows.new_zeros(len(rows)) if bias is None else bias.flatten()


def _bias_of(module: nn.Module) -> Tensor:
    weight, bias = weight_of(module), module.bias
    return bias.detach().double().clone() if isinstance(bias, Tensor) else weight.new_zeros(len(weight)).double()


def _rest(old: nn.Module, layer: Layer) -> Tensor:
    """Return the features of a fused projection that are neither queries nor keys."""
    free = torch.ones(weight_of(old).shape[0], dtype=torch.bool)
    free[layer.query.rows.flatten()] = free[layer.key.rows.flatten()] = False
    return free.nonzero().squeeze(-1)


def _places(old: nn.Module, layer: Layer) -> Tensor:
    """Return where queries, keys and the rest, in this order, stand in the output of a fused projection."""
    return torch.cat((layer.query.rows.flatten(), layer.key.rows.flatten(), _rest(old, layer)))


def _in_order(rows: Tensor) -> bool:
    return bool(torch.equal(rows.flatten(), torch.arange(rows.numel())))
