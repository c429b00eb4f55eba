"""Calibration of one routing layer: k-means on what it routes, and how much of its attention the clusters keep."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrewrite.kernels.routing.calibration import k_means, one_sided
from attnrewrite.kernels.routing.centroids import CentroidState, accumulate
from attnrewrite.kernels.routing.clusters import routing_features
from attnrewrite.kernels.routing.mass import Captured, captured, met_pairs, near_pairs
from attnrewrite.kernels.routing.prepare import Options, Routed
from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.rules.heads import Heads, take
from attnrewrite.passes.rules.routing import routed, routing_arguments, valid_keys

if TYPE_CHECKING:
    from attnrewrite.observation import Observed
    from attnrewrite.variants.centroids import Centroids

VECTORS = 100_000
"""About how many queries and keys are clustered per KV head."""

_PER_SEQUENCE = ("query", "key", "value", "attn_mask", "routing_query", "routing_key", "valid")


class RoutingCalibrator:
    """See ``attnrewrite.variants.base.Calibrator``; the rows are one per query head that routes.

    ``routing``, ``local`` and ``random`` are the mean dense weight on the keys that a query meets, on those within
    ``local_window`` (else the window size), and on as many random keys. ``one_sided`` counts the clusters of which
    queries or keys have more than 20 times the members of the other.
    """

    def __init__(self, layer: str, holder: Centroids) -> None:
        self.layer, self.holder = layer, holder
        self.heads = Heads((), (), (), 1)
        self.samples: dict[str, list[Tensor]] = {"query": [], "key": []}  # [Hr, T, D], [Hc, T, D], on the CPU
        self.set: dict[str, Tensor] = {}  # centroids and centers, as the holder names them
        self.state: CentroidState | None = None
        self.members = {role: torch.zeros_like(holder.get_buffer("ema_count")) for role in self.samples}  # [Hc, C]
        self.kept: list[Captured] = []

    def collect(self, at: Observed, share: float, generator: torch.Generator) -> None:
        """Take the projections of as many tokens as are this batch's share."""
        t, config = at.tensors, at.request.config
        self.heads = Heads.of(t.site, config)
        wanted = math.ceil(VECTORS * share / (self.heads.group + 1))
        for role, own in self._sides(config["shared_qk"]):
            states = take(routed(t, role), own)  # [B, heads, N, D]
            tokens = states.transpose(1, 2).flatten(0, 1)  # [B N, heads, D]
            real = _valid(t, role)
            if real is not None:
                tokens = tokens[real.flatten()]
            chosen = torch.randperm(len(tokens), generator=generator)[:wanted].to(tokens.device)
            self.samples[role].append(tokens[chosen].transpose(0, 1).cpu())

    @property
    def seen(self) -> bool:
        """Whether the first pass came by here."""
        return bool(self.samples["query"])

    def fit(self, generator: torch.Generator) -> None:
        """Center queries and keys, as they lie in different cones, and cluster them together, KV head by KV head."""
        device, numbers = self.holder.get_buffer("centroids").device, self._set_numbers()
        query = torch.cat(self.samples["query"], dim=1).to(device, torch.float32)
        groups = [query[[n for n, own in enumerate(numbers) if own == s]] for s in range(len(self.heads.sets))]
        centers = torch.stack([group.mean((0, 1)) for group in groups])
        parts = [[_features(group, center)] for group, center in zip(groups, centers, strict=True)]
        self.set = {"center_query": centers, "center_key": torch.zeros_like(centers)}
        if self.samples["key"]:
            key = torch.cat(self.samples["key"], dim=1).to(device, torch.float32)
            self.set["center_key"] = key.mean(1)
            for part, own, center in zip(parts, key, self.set["center_key"], strict=True):
                part.append(_features(own.unsqueeze(0), center))
        C = self.holder.get_buffer("centroids").shape[1]
        states = []
        for part in parts:
            tokens = torch.cat(part).unsqueeze(0)  # [1, M, D]
            seed = int(torch.randint(2**31, (), generator=generator))
            states.append(k_means(tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool), C, seed=seed))
        self.state = CentroidState(*map(torch.cat, zip(*states, strict=True)))
        self.set["centroids"] = self.state.centroids
        self.samples.clear()

    def measure(self, at: Observed) -> None:
        """Add up the dense weights that routing would keep, and the members of clusters."""
        t = dataclasses.replace(at.tensors, extra={**at.tensors.extra, **self.set})
        arguments = routing_arguments(t, at.request)
        inputs = Routed(**{name: arguments[name] for name in Routed._fields if name in arguments})
        options = Options(**{name: arguments[name] for name in Options._fields})
        B, _, L, _ = inputs.query.shape
        visible, valid = t.visible(), _valid(t, "query")
        S, C = inputs.key.shape[2], self.state.centroids.shape[1] if self.state else 1
        window = at.request.config["local_window"] or options.window_size or -(-S // C)
        near = near_pairs(L, S, window, is_causal=options.is_causal, device=inputs.query.device)
        for b in range(B):  # one by one, as dense weights are large
            parts: dict[str, Any] = {name: _entry(getattr(inputs, name), b, B) for name in _PER_SEQUENCE}
            one = inputs._replace(**parts)
            logits = attention_logits(one.query, one.key, one.attn_mask, scale=t.site.scores.alpha)
            weights = masked_softmax(logits, _entry(visible, b, B))
            self.kept.append(captured(weights, met_pairs(one, options), near, _entry(valid, b, B)))
        self._count(t, at.request.config["shared_qk"])

    def apply(self) -> None:
        """Write centroids and centers into the layer."""
        assert self.state is not None
        self.holder.set(self.state, self.set["center_query"], self.set["center_key"])

    def rows(self) -> list[dict[str, Any]]:
        """Return the means, and the members of each cluster of the head's KV head."""
        routing, local, random, queries = (torch.stack(part).sum(0) for part in zip(*self.kept, strict=True))
        few = one_sided(self.members["query"], self.members["key"]).sum(-1)
        return [
            {
                "layer": self.layer,
                "head": head,
                "routing": float(routing[n] / queries),
                "local": float(local[n] / queries),
                "random": float(random[n] / queries),
                "one_sided": int(few[own]),
                "queries": self.members["query"][own].int().tolist(),
                "keys": self.members["key"][own].int().tolist(),
            }
            for n, (head, own) in enumerate(zip(self.heads.routing, self._set_numbers(), strict=True))
        ]

    def _sides(self, shared: bool) -> list[tuple[Any, Any]]:
        sides: list[tuple[Any, Any]] = [("query", self.heads.routing)]
        return sides if shared else [*sides, ("key", self.heads.sets)]

    def _set_numbers(self) -> list[int]:
        return [self.heads.sets.index(head // self.heads.group) for head in self.heads.routing]

    def _count(self, t: SiteTensors, shared: bool) -> None:
        for role, own in self._sides(shared):
            numbers = self._set_numbers() if role == "query" else list(range(len(own)))
            features = routing_features(take(routed(t, role), own), self.set[f"center_{role}"][numbers])
            counts, _ = accumulate(features, self.set["centroids"][numbers], _valid(t, role))
            self.members[role].index_add_(
                0, torch.tensor(numbers, device=counts.device), counts.to(self.members[role].dtype)
            )


def _features(states: Tensor, center: Tensor) -> Tensor:
    """Return the features of ``[heads, T, D]`` as one list of tokens, ``[heads T, D]``."""
    return routing_features(states.unsqueeze(0), center.unsqueeze(0)).flatten(0, 2)


def _valid(t: SiteTensors, role: str) -> Tensor | None:
    """Return which tokens are real, ``[B, N]``; in cross-attention padding tells of keys only."""
    return valid_keys(t) if role == "key" or same_length(t.site) else None


def _entry(x: Tensor | None, b: int, B: int) -> Tensor | None:
    """Return one entry of a batch; a tensor that is the same for all has one."""
    return x if x is None or x.shape[0] != B else x[b : b + 1]
