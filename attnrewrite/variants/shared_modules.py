"""Modules whose queries and keys come from one projection; they take the places of a layer's own projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnrewrite.kernels.symmetric.fit import PairForm
from attnrewrite.kernels.symmetric.reference import pairwise_query


@dataclass(frozen=True)
class Sharing:
    """What is shared in one layer: the module paths of queries and keys, equal where one module makes both.

    ``form`` is that of the matrices between them, None where there are none. ``new_key``: the projection of the keys
    is replaced, too; ``bias``: the shared projection has one. ``rows``, ``order``: features of the projections are
    not laid out head by head, so that buffers say which is which.
    """

    query: str
    key: str
    heads: int
    kv_heads: int
    head_dim: int
    form: PairForm | None = None
    new_key: bool = False
    bias: bool = False
    rows: bool = False
    order: bool = False


class _Sharer(nn.Module):
    """Makes the queries of all heads from the shared projection."""

    pair: Tensor | None
    order: Tensor | None

    def __init__(self, sharing: Sharing, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sharing = sharing
        H, D = sharing.heads, sharing.head_dim
        shape = (H, D) if sharing.form == "diag" else (H, D, D)
        pair = None if sharing.form is None else nn.Parameter(torch.empty(shape, dtype=dtype))
        self.register_parameter("pair", pair)
        self.register_buffer("order", torch.empty(features, dtype=torch.int64) if sharing.order else None)

    def matrices(self) -> Tensor | None:
        """Return S of every query head, ``[H, D, D]``, or None where queries and keys are one."""
        if self.pair is None or self.sharing.form == "full":
            return self.pair
        return torch.diag_embed(self.pair) if self.sharing.form == "diag" else (self.pair + self.pair.mT) / 2

    def queries(self, shared: Tensor) -> Tensor:
        """Return ``r S``, ``[.., L, H D]``, for r = ``shared`` ``[.., L, Hkv D]``."""
        pair = self.matrices()
        if pair is None:
            return shared
        shape = (*shared.shape[:-1], self.sharing.kv_heads, self.sharing.head_dim)
        heads = shared.view(shape).transpose(-3, -2)  # [.., Hkv, L, D]
        whole = heads if heads.dim() == 4 else heads.reshape(-1, *heads.shape[-3:])
        query = pairwise_query(whole, pair).transpose(-3, -2).flatten(-2)  # [B, L, H D]
        return query.reshape(*shared.shape[:-1], -1)

    def arranged(self, features: Tensor) -> Tensor:
        """Bring features to where the model looks for them."""
        return features if self.order is None else features[..., self.order]

    def extra_repr(self) -> str:
        """Say how many heads, and what is between queries and keys."""
        what = self.sharing
        return f"heads={what.heads}, kv_heads={what.kv_heads}, head_dim={what.head_dim}, pair={what.form}"


class SharedQuery(_Sharer):
    """In the place of a layer's query projection: queries from the projection of the keys, which holds the weights."""

    rows: Tensor | None

    def __init__(self, sharing: Sharing, key: nn.Module, dtype: torch.dtype) -> None:
        features = sharing.kv_heads * sharing.head_dim
        super().__init__(sharing, sharing.heads * sharing.head_dim, dtype)
        self.source = (key,)  # in a tuple, so that it is not registered a second time
        self.register_buffer("rows", torch.empty(features, dtype=torch.int64) if sharing.rows else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the queries, ``[.., H D]``."""
        shared: Tensor = self.source[0](x)
        return self.arranged(self.queries(shared if self.rows is None else shared[..., self.rows]))


class SharedFused(_Sharer):
    """In the place of a projection that makes queries and keys among others: a smaller one, ``proj``.

    ``proj`` gives the shared projection, head by head, and behind it what the old one gave besides.
    """

    def __init__(self, sharing: Sharing, old: nn.Module) -> None:
        width, features = sharing.kv_heads * sharing.head_dim, _size(old)[0]
        queries = sharing.heads * sharing.head_dim
        super().__init__(sharing, features, _weight(old).dtype)
        self.proj = projection_like(old, features - queries, sharing.bias)
        self.sizes = [width, features - queries - width]

    def forward(self, x: Tensor) -> Tensor:
        """Return queries, keys and the rest as the old projection did."""
        shared, rest = self.proj(x).split(self.sizes, -1)
        return self.arranged(torch.cat((self.queries(shared), shared, rest), -1))


def empty_modules(model: nn.Module, sharing: Sharing) -> dict[str, nn.Module]:
    """Return what takes the places of ``model``'s projections, by path, on the meta device: shapes without values."""
    with torch.device("meta"):
        if sharing.query == sharing.key:
            return {sharing.key: SharedFused(sharing, model.get_submodule(sharing.key))}
        key = model.get_submodule(sharing.key)
        replaced = {sharing.key: projection_like(key, _size(key)[0], sharing.bias)} if sharing.new_key else {}
        query = SharedQuery(sharing, replaced.get(sharing.key, key), _weight(key).dtype)
        return {**replaced, sharing.query: query}


def unusable(module: nn.Module) -> str | None:
    """Say why ``module`` is no ordinary linear layer, of torch or of transformers' GPT-2; None where it is one."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            "in a torch.nn.MultiheadAttention, which has one parameter for all projections: none can be removed alone. "
            "Write the layer with a torch.nn.Linear for each, and load the weights into them, first"
        )
    if not (type(module) is nn.Linear or _is_conv1d(module)):
        made = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"a {made}; needed is torch.nn.Linear, or transformers' Conv1D"
    if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        return f"a layer whose weight is a {type(module.weight).__name__}; needed is a parameter of floats"
    return None


def projection_like(old: nn.Module, features: int, bias: bool) -> nn.Module:
    """Return a projection of the same kind and input with another number of output features."""
    weight, width = _weight(old), _size(old)[1]
    if _is_conv1d(old):
        made: nn.Module = type(old)(features, width)
        return made.to(weight.dtype)
    return nn.Linear(width, features, bias, dtype=weight.dtype)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as ``[out, in]``."""
    weight = _weight(module).detach()
    return weight.mT if _is_conv1d(module) else weight


def as_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """Return ``[out, in]`` in the layout of the module's own weight."""
    return (weight.mT if _is_conv1d(module) else weight).contiguous()


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _size(module: nn.Module) -> tuple[int, int]:
    out, width = weight_of(module).shape
    return int(out), int(width)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
