"""Routing attention: config, centroids, and the choice of heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attnrewrite.kernels.diagnostics import error
from attnrewrite.variants.base import Calibrator, VariantConfig

if TYPE_CHECKING:
    import torch

    from attnrewrite.passes.attention.form import Attention


@dataclass(frozen=True)
class RoutingConfig(VariantConfig):
    """Routing attention (Roy, Saffar, Vaswani, Grangier, TACL 2021, arXiv 2003.05997).

    clusters: C, how many centroids each KV head has.
    window_size: w, members of a cluster ("topw"), or keys per query ("argmax_window"); None is ceil(N / C), which
        depends on the length: name a number where lengths vary.
    rule: "argmax_window" meets the nearest keys of the query's cluster and is exactly causal; "topw" is the paper's, in
        which a cluster takes its w nearest tokens; "auto" is the first for causal layers and the second for others.
    paper_causal: allow "topw" in causal layers. Later tokens then decide which earlier ones a cluster takes: outputs
        leak, and no decoding gives the same.
    logits: "raw" scores queries and keys as the layer does; "normed" scores them normalised, as the paper's code does,
        where no rotary embedding or norm comes between.
    shared_qk: whether the query is the key, too, as in the paper's causal layers; for training from scratch.
    temperature: factor of the logits; None is the layer's own.
    routing_heads: query heads that route; None is all that are not local.
    local_heads: query heads that attend to near keys only. Heads of neither kind stay as they are.
    local_window: how near: keys less than this many positions away.
    ema_decay: of the moving average by which centroids follow the data, one step per attnrewrite.update.
    ema_warmup: for how many updates at first the decay is 0.99, where that is less.
    reseed_every: after how many updates dead clusters move onto tokens that no centroid is near; 0 is never.
    reseed_below: a cluster is dead below this share of its head's mean count.
    """

    variant: ClassVar[str] = "routing"

    clusters: int = 16
    window_size: int | None = None
    rule: Literal["auto", "argmax_window", "topw"] = "auto"
    paper_causal: bool = False
    logits: Literal["raw", "normed"] = "raw"
    shared_qk: bool = False
    temperature: float | None = None
    routing_heads: tuple[int, ...] | None = None
    local_heads: tuple[int, ...] = ()
    local_window: int | None = None
    ema_decay: float = 0.999
    ema_warmup: int = 1000
    reseed_every: int = 500
    reseed_below: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = (*(self.routing_heads or ()), *self.local_heads)
        temperature = self.temperature
        needed = {
            "clusters": ("1 or more", self.clusters >= 1),
            "window_size": ("1 or more", self.window_size is None or self.window_size >= 1),
            "temperature": ("greater than 0", temperature is None or 0 < temperature < float("inf")),
            "routing_heads": ("one head at least", self.routing_heads != ()),
            "local_heads": ("heads once each, none of them in routing_heads", len(set(heads)) == len(heads)),
            "local_window": ("1 or more, with local_heads only", _is_window(self.local_window, self.local_heads)),
            "paper_causal": ("false unless rule is 'topw'", not self.paper_causal or self.rule == "topw"),
            "ema_decay": ("between 0 and 1", 0 <= self.ema_decay <= 1),
            "ema_warmup": ("0 or more", self.ema_warmup >= 0),
            "reseed_every": ("0 or more", self.reseed_every >= 0),
            "reseed_below": ("between 0 and 1", 0 <= self.reseed_below <= 1),
        }
        for name, (wanted, holds) in needed.items():
            if not holds:
                raise error("AR303", f"routing.{name} is {getattr(self, name)!r}; needed is {wanted}")

    @property
    def adds_parameters(self) -> bool:
        """Centroids in every layer: buffers, not parameters."""
        return True

    @property
    def learns_from_inputs(self) -> bool:
        """Centroids follow what the layer routes."""
        return True

    @property
    def state_names(self) -> tuple[str, ...]:
        """The cluster of each key per KV head that routes; queries too, where they are the keys."""
        if self.rule == "topw":  # has no decoding that equals its whole pass
            return ()
        return ("clusters", "queries") if self.shared_qk else ("clusters",)

    def new_state(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return places for the clusters ``[B, L, Hc]`` of new keys, and for queries ``[B, L, Hc, D]``."""
        import torch

        assert holder is not None
        sets, _, width = holder.get_buffer("centroids").shape
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        places = {
            "clusters": x.new_zeros(*x.shape[:2], sets, dtype=torch.int32),
            "queries": x.new_zeros(*x.shape[:2], sets, width, dtype=kind),
        }
        return {name: places[name] for name in self.state_names}

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return centroids [Hc, C, D] of one layer, not yet set; Hc counts the KV heads that route."""
        from attnrewrite.passes.rules.heads import Heads

        sets = len(Heads.of(site, self.to_dict()).sets)
        return self.empty_module({"centroids": (sets, self.clusters, site.sizes()["D"])}).to(device)

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the module with centroids that are not set."""
        from attnrewrite.variants.centroids import Centroids

        return Centroids(*shapes["centroids"])

    def calibrator(self, layer: str, holder: torch.nn.Module) -> Calibrator:
        """Return k-means on what the layer routes, and the share of attention that its routing keeps."""
        from attnrewrite.variants.routing_calibration import RoutingCalibrator

        return RoutingCalibrator(layer, holder)  # type: ignore[arg-type]  # made by empty_module

    def update(self, layer: str, holder: torch.nn.Module) -> None:
        """Move the centroids by what the layer saw since the last update."""
        holder.advance(layer, self.ema_decay, self.ema_warmup, self.reseed_every, self.reseed_below)  # type: ignore[operator]  # Centroids

    def plan(self, rows: list[dict[str, Any]], margin: float = 0.02) -> dict[str, VariantConfig | str]:
        """Return a plan for ``convert`` in which only heads route whose routing pays, by the rows of a calibration.

        Such a head captures more attention than a local window does, and more than random keys do by ``margin``. The
        others are as they were; a layer without such heads is left out.
        """
        found: dict[str, list[int]] = {}
        for row in rows:
            own = found.setdefault(row["layer"], [])
            if row["routing"] > row["local"] and row["routing"] > row["random"] + margin:
                own.append(row["head"])
        return {
            layer: dataclasses.replace(self, routing_heads=tuple(heads)) if heads else "sdpa"
            for layer, heads in found.items()
        }


def _is_window(window: int | None, heads: tuple[int, ...]) -> bool:
    return window is not None and window >= 1 if heads else window is None
