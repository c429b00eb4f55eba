"""From a layer's own query and key projections to a shared one: which can be replaced, and by what."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnrewrite.errors import AttnRewriteWarning
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.symmetric.layer import Moments, Projections, SharedLayer, fit_layer, with_pair
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.facts.heads import HeadRows, head_rows
from attnrewrite.passes.facts.provenance import Provenance
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.nodes import same_value
from attnrewrite.passes.pipeline import not_applied
from attnrewrite.passes.report import Site
from attnrewrite.variants.base import Swap
from attnrewrite.variants.shared_modules import Sharing, empty_modules, unusable, weight_of
from attnrewrite.variants.shared_values import Layer, swap_of

if TYPE_CHECKING:
    from attnrewrite.variants.symmetric import SymmetricConfig


def share(
    config: SymmetricConfig,
    model: nn.Module,
    capture: Capture,
    sites: Mapping[str, tuple[Attention, Site]],
    run: Callable[[], object],
) -> dict[str, Swap]:
    """Do what ``SymmetricConfig.swaps`` does."""
    layers = _readable(config, model, Provenance(capture), sites)
    moments = _moments(model, layers.values(), run) if config.fit == "data" else {}
    for path, found in moments.items():
        if not bool(found.second.isfinite().all()):
            raise error("AR102", f"{path} gets inputs that are not finite numbers: nothing can be fitted to them")
    fitted = {layer: _fitted(config, found, moments.get(found.query.module)) for layer, found in layers.items()}
    kept = _close_enough(config, fitted)
    _warn_of_direction(config, [layers[layer].row for layer in kept])
    return {layer: swap_of(config, model, layers[layer], fitted[layer]) for layer in kept}


def shared_modules(model: nn.Module, details: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Do what ``SymmetricConfig.swapped_modules`` does."""
    known = dict(model.named_modules())
    for path in (details.get("query"), details.get("key")):
        if path not in known:
            raise error("AR603", f"{type(model).__name__} has no module {path!r}")
        if (reason := unusable(known[path])) is not None:
            raise error("AR603", f"{path} is {reason}")
    try:
        return empty_modules(model, Sharing(**{f.name: details[f.name] for f in fields(Sharing)}))
    except (KeyError, TypeError, ValueError, RuntimeError) as failure:
        raise error("AR604", f"the shared projection in {details['key']} is described wrongly: {failure!r}") from None


# --- which layers -----------------------------------------------------------------------------------------


def _readable(
    config: SymmetricConfig, model: nn.Module, provenance: Provenance, sites: Mapping[str, tuple[Attention, Site]]
) -> dict[str, Layer]:
    """Read the projections of every layer. Raises VariantError AR307 that names all that cannot be shared."""
    names = _names(model)
    found, failed = dict[str, Layer](), []
    for layer, (site, row) in sites.items():
        try:
            found[layer] = _read(config, model, site, row, provenance, names)
        except Reject as reject:
            row.rejections.append(reject.rejection(row.layer, row.source))
            failed.append(row)
    if failed:
        raise not_applied(failed)
    return found


def _read(
    config: SymmetricConfig,
    model: nn.Module,
    site: Attention,
    row: Site,
    provenance: Provenance,
    names: Mapping[int, list[str]],
) -> Layer:
    def refuse(reason: str) -> Reject:
        return Reject("AR307", reason, site.anchor)

    if row.cross or site.keys is not None:
        raise refuse("queries and keys come from different sequences, so that no projection can be shared")
    query, key = head_rows(site, "query", provenance), head_rows(site, "key", provenance)
    for role, path in (("queries", query.module), ("keys", key.module)):
        module = model.get_submodule(path)
        if (reason := unusable(module)) is not None:
            raise refuse(f"the projection of the {role}, {path}, is {reason}")
        tied = [name for p in module.parameters() for name in names[id(p)] if name.rpartition(".")[0] != path]
        if tied:
            raise refuse(f"the projection of the {role}, {path}, is tied to {tied[0]}")
    weights = [weight_of(model.get_submodule(x.module))[x.rows.flatten()] for x in (query, key)]
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise refuse("weights of the projections are not finite numbers")
    if not same_value(query.source, key.source):
        raise refuse("queries and keys are projections of different inputs")
    if query.module != key.module and query.rows.numel() != weight_of(model.get_submodule(query.module)).shape[0]:
        raise refuse(f"{query.module} gives something else beside the queries")
    symmetric = config.form == "symmetric"
    if symmetric and row.rope not in ("none", "half", "interleaved"):
        raise refuse("the queries turn with the position in a way that is not read, so that nothing can be fitted")
    if symmetric and row.cache == "none" and "key" in (row.other_users or ()):
        raise refuse("the keys are also used outside of the attention")
    return Layer(row, query, key, _projections(model, query, key, row))


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Return every name of every parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _projections(model: nn.Module, query: HeadRows, key: HeadRows, row: Site) -> Projections:
    (w_q, b_q), (w_k, b_k) = (_of_heads(model.get_submodule(x.module), x.rows) for x in (query, key))
    rotary = row.rope_dims if isinstance(row.rope_dims, int) else 0
    keeps_keys = row.qk_norm != "none" or row.rope not in ("none", "half", "interleaved")
    return Projections(w_q, w_k, b_q, b_k, rotary, row.rope == "interleaved", keeps_keys)


def _of_heads(module: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight ``[heads, D, d]`` and the bias ``[heads, d]`` of the rows ``[heads, d]``."""
    bias = module.bias
    weight = weight_of(module)[rows].mT.double()
    return weight, bias.detach()[rows].double() if isinstance(bias, Tensor) else None


# --- the fit ----------------------------------------------------------------------------------------------


def _moments(model: nn.Module, layers: Iterable[Layer], run: Callable[[], object]) -> dict[str, Moments]:
    """Run the model, and return the moments of what the query projections get as input, by path."""
    sums: dict[str, list[Tensor]] = {}

    def look(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).double()  # [N, D]
            found = [torch.tensor(float(len(x)), device=x.device), x.sum(0), x.mT @ x]
            sums[path] = [a + b for a, b in zip(sums[path], found, strict=True)] if path in sums else found

        return see

    paths = dict.fromkeys(layer.query.module for layer in layers)
    handles = [model.get_submodule(path).register_forward_pre_hook(look(path)) for path in paths]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: Moments(total / count, second / count) for path, (count, total, second) in sums.items()}


def _fitted(config: SymmetricConfig, layer: Layer, moments: Moments | None) -> SharedLayer:
    if config.form == "symmetric":
        return fit_layer(layer.projections, moments, None)
    if config.pair_init == "converted":
        return fit_layer(layer.projections, moments, config.pair_form)
    return with_pair(layer.projections, moments, _first_pair(config, layer.projections.query))


def _first_pair(config: SymmetricConfig, query: Tensor) -> Tensor:
    """Return matrices to train from scratch, ``[H, d, d]``."""
    H, _, d = query.shape
    if config.pair_init == "identity":
        return torch.eye(d).expand(H, d, d)
    drawn = torch.randn(H, d, d) if config.pair_form != "diag" else torch.diag_embed(torch.randn(H, d))
    drawn = drawn if config.pair_form != "symmetric" else (drawn + drawn.mT) / 2
    return (drawn * d**-0.5 if config.pair_init == "scaled" else drawn).to(query.device)


def _close_enough(config: SymmetricConfig, fitted: Mapping[str, SharedLayer]) -> list[str]:
    """Return the layers to convert; warn of those that are not. Raises VariantError AR321 where none is left."""
    if config.form == "pairwise" and config.pair_init != "converted":
        return list(fitted)
    errors = {layer: _error(found) for layer, found in fitted.items()}
    limit = config.max_error if config.max_error < 1 else math.inf
    far = {layer: found for layer, found in errors.items() if found > limit}
    if far:
        some = ", ".join(f"{layer} {found:.2f}" for layer, found in list(far.items())[:4])
        more = f", and {len(far) - 4} more" if len(far) > 4 else ""
        detail = f"relative errors above max_error = {config.max_error:g}: {some}{more}"
        if len(far) == len(fitted):
            raise error("AR321", detail)
        _warn("AR321", f"{len(far)} of {len(fitted)} layers stay as they are; {detail}")
    return [layer for layer in fitted if layer not in far]


def _error(found: SharedLayer) -> float:
    """Return the root mean square over heads, in the norm of the inputs where it is known."""
    errors = torch.tensor(found.errors if found.weighted is None else found.weighted)
    return float(errors.square().mean().sqrt())


def _warn_of_direction(config: SymmetricConfig, rows: list[Site]) -> None:
    """Warn once where equal queries and keys lose what a layer tells apart."""
    causal = [row.layer for row in rows if row.mask.offset is not None]
    turning = [row.layer for row in rows if row.rope not in (None, "none")]
    if config.form == "symmetric" and (causal or turning):
        _warn("AR320", f"{len(causal)} of {len(rows)} layers are causal, {len(turning)} have rotary embedding")


def _warn(code: str, detail: str) -> None:
    warnings.warn(str(error(code, detail)), AttnRewriteWarning, stacklevel=6)
