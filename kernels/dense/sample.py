"""A call like another one, of random numbers: what a kernel is checked and timed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.catalogue import OF_SYMMETRY
from attnrewrite.kernels.dense.decode import decode, few
from attnrewrite.kernels.dense.launch import Gradients, Wanted, backward, forward
from attnrewrite.kernels.dense.plain import (
    plain_backward,
    plain_forward,
    plain_selective_backward,
    plain_selective_forward,
)
from attnrewrite.kernels.dense.selective import SHORTEST_SKIP, Selection, selective_backward, selective_forward
from attnrewrite.kernels.dense.shared import backward_shared, shares
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.symmetric.reference import pairwise_query

if TYPE_CHECKING:
    from attnrewrite.kernels.dense.launch import Launch

_FEW_VOTES = 1e-3
"""Times the votes: so little that no key dies, and everything that can be visited is."""
_SLICE = 200


@dataclass(frozen=True)
class Recipe:
    """How to make a call of any kernel of the family; plain data, so that another process can make it.

    kind: "selective" counts votes first, "symmetric" has its queries for keys.
    mask: the shape of the mask, empty for none; ``bias``: it has numbers instead of truth values.
    pair: queries are multiplied with a factor on chip.
    placed: the first query's position is a number on the device.
    selector: the features of what votes in the place of a head, 0 where a head does.
    learns: whether there is a backward pass.
    """

    B: int
    H: int
    Hkv: int
    L: int
    S: int
    D: int
    Dv: int
    dtype: str = "bfloat16"
    kind: Literal["dense", "selective", "symmetric"] = "dense"
    scale: float = 1.0
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    offset: int = 0
    mask: tuple[int, ...] = ()
    bias: bool = False
    bias_gradient: bool = False
    sinks: bool = False
    slopes: bool = False
    slope_gradient: bool = False
    temperatures: bool = False
    pair: bool = False
    placed: bool = False
    selector: int = 0
    learns: bool = False

    @classmethod
    def of(cls, launch: Launch) -> Recipe:
        """Return the recipe of a call like that of ``launch``."""
        call, how = launch.call, launch.call.how
        symmetric = call.pair is not None or launch.name in OF_SYMMETRY
        return cls(
            *call.sizes,
            call.query.shape[3],
            call.value.shape[3],
            dtype=str(call.query.dtype).removeprefix("torch."),
            kind="selective" if call.strength is not None else "symmetric" if symmetric else "dense",
            scale=how.scale,
            causal=how.is_causal,
            window=how.window,
            softcap=how.softcap,
            dropout_p=how.dropout_p,
            offset=how.offset,
            mask=() if call.mask is None else tuple(call.mask.shape),
            bias=call.mask_kind() == "bias",
            bias_gradient=bool(launch.given["BIAS_GRADIENT"]),
            sinks=how.sinks is not None,
            slopes=how.slopes is not None,
            slope_gradient=bool(launch.given["SLOPE_GRADIENT"]),
            temperatures=call.query_temperature is not None,
            pair=call.pair is not None,
            placed=bool(launch.given["PLACED"]),
            selector=_selector(launch),
            learns=launch.name == "delta" or launch.name.startswith("backward"),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Read plain data that ``dataclasses.asdict`` made."""
        return cls(**{**data, "mask": tuple(data["mask"])})

    def slice(self) -> Recipe:
        """Return a small call that runs the same kernels."""
        least = SHORTEST_SKIP if self.kind == "selective" and self.S >= SHORTEST_SKIP else _SLICE
        S = min(self.S, least)
        L = S if self.L == self.S else min(self.L, S)
        group = self.H // self.Hkv
        whole = (1, group, L, S)[4 - len(self.mask) :]
        mask = tuple(min(sizes) for sizes in zip(self.mask, whole, strict=True))
        offset = S - L if self.offset else 0
        return dataclasses.replace(self, B=1, H=group, Hkv=1, L=L, S=S, mask=mask, offset=offset)


class Sample:
    """The tensors of a recipe, and what is made of them. Everything is drawn from one seed."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self._source = torch.Generator(device).manual_seed(0)

    @cached_property
    def call(self) -> Call:
        """The call."""
        r = self.recipe
        query = self._normal(r.B, r.H, r.L, r.D)
        key = query if r.kind == "symmetric" else self._normal(r.B, r.Hkv, r.S, r.D)
        how = Options(r.scale, r.causal, r.window, r.softcap, dropout_p=r.dropout_p, offset=r.offset)
        how = dataclasses.replace(
            how,
            sinks=self._between(-1.0, 1.0, r.H) if r.sinks else None,
            slopes=self._between(0.0, 0.1, r.H) if r.slopes else None,
        )
        selective = r.kind == "selective"
        return Call(
            query,
            key,
            self._normal(r.B, r.Hkv, r.S, r.Dv),
            how,
            self._mask(),
            strength=torch.tensor(_FEW_VOTES, device=self.device) if selective else None,
            pair=self._normal(r.H, r.D, r.D) / r.D**0.5 if r.pair else None,
            query_temperature=self._between(0.5, 1.5, r.B, r.H, r.L) if r.temperatures else None,
            value_temperature=self._between(0.5, 1.5, r.B, r.Hkv, r.S) if r.temperatures else None,
            seed=torch.tensor(1, device=self.device) if r.dropout_p else None,
        )

    @cached_property
    def who(self) -> Selection:
        """Who votes."""
        protected = torch.arange(self.recipe.S, device=self.device)[None] == 0
        earlier = torch.zeros(self.recipe.B, self.recipe.S, device=self.device)
        position = torch.tensor(self.recipe.offset, device=self.device) if self.recipe.placed else None
        own = None
        if r := self.recipe.selector:
            own = self._normal(self.recipe.B, self.recipe.L, r), self._normal(self.recipe.B, self.recipe.S, r)
        return Selection(0, protected, earlier, position, own)

    @property
    def wanted(self) -> Wanted:
        """The gradients that take work of their own."""
        return Wanted(self.recipe.bias_gradient, self.recipe.slope_gradient)

    @cached_property
    def upstream(self) -> Tensor:
        """The gradient of the output."""
        return self._normal(self.recipe.B, self.recipe.H, self.recipe.L, self.recipe.Dv)

    def run(self) -> list[Tensor]:
        """Run the kernels; return the output and every gradient."""
        call, who, upstream = self.call, self.who, self.upstream
        if call.strength is not None:
            out, lse, votes = selective_forward(call, who)
            if not self.recipe.learns:
                return [out, votes]
            later = torch.zeros_like(who.earlier)
            found = selective_backward(call, who, out, lse, upstream, later, self.wanted)
            return [out, votes, *_tensors(found.dense), found.strength, found.earlier, *(found.selector or ())]
        out, lse = (decode if few(call) else forward)(call)
        if not self.recipe.learns:
            return [out]
        if self.recipe.kind == "symmetric" and shares(call):
            both = backward_shared(call, out, lse, upstream)
            return [out, both.query, both.value]
        found_dense, _ = backward(call, out, lse, upstream, self.wanted)
        return [out, *_tensors(found_dense)]

    def expected(self) -> list[Tensor]:
        """Return what ``run`` should, by plain PyTorch in float64. There is none with dropout: numbers differ."""
        call, who, upstream = _wide(self.call), self.who, self.upstream.double()
        if call.strength is not None:
            own = None if who.selector is None else (who.selector[0].double(), who.selector[1].double())
            who = dataclasses.replace(who, earlier=who.earlier.double(), selector=own)
            out, _, votes = plain_selective_forward(call, who, 1)
            if not self.recipe.learns:
                return [out, votes]
            later = torch.zeros_like(who.earlier)
            found = plain_selective_backward(call, who, out, upstream, later, self.wanted)
            return [out, votes, *_tensors(found.dense), found.strength, found.earlier, *(found.selector or ())]
        out, _ = plain_forward(call)
        if not self.recipe.learns:
            return [out]
        dense = plain_backward(call, out, upstream, self.wanted)
        if self.recipe.kind == "symmetric" and shares(self.call):
            return [out, dense.query + dense.key, dense.value]
        return [out, *_tensors(dense)]

    def _normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self._source, device=self.device)
        return drawn.to(getattr(torch, self.recipe.dtype))

    def _between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._source, device=self.device)

    def _mask(self) -> Tensor | None:
        r = self.recipe
        if not r.mask:
            return None
        if r.bias:
            return self._normal(*r.mask)
        seen = torch.rand(r.mask, generator=self._source, device=self.device) < 0.9  # most of them
        seen[..., 0] = True
        return seen


def _selector(launch: Launch) -> int:
    """Return the features of a selector, 0 for a kernel that is the same for a head."""
    of_heads, names = launch.call.flags(), ("D", "MASK", "SOFTCAP")
    return int(launch.given["D"]) if any(launch.given[x] != of_heads[x] for x in names) else 0


def _wide(call: Call) -> Call:
    """Return a call in float64, with the factor of queries multiplied in."""
    query = call.query if call.pair is None else pairwise_query(call.query.double(), call.pair.double())
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    tensors: dict[str, Any] = {
        name: value.double()
        for name, value in fields.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    tensors |= {"query": query.double(), "pair": None}
    return dataclasses.replace(call, **tensors)


def _tensors(found: Gradients) -> list[Tensor]:
    return [x for x in vars(found).values() if x is not None]
