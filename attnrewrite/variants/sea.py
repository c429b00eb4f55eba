"""SEA: config, and the network that estimates the attention matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attnrewrite.kernels.diagnostics import error
from attnrewrite.variants.base import VariantConfig

if TYPE_CHECKING:
    import torch

    from attnrewrite.passes.attention.form import Attention

LONGEST_TABLE = 8192
"""Beyond this many positions a learned table costs more parameters than the rest of the layer."""


@dataclass(frozen=True)
class SEAConfig(VariantConfig):
    """Sparse attention with an estimated mask (Lee, Kim, Willette, Hwang, ICLR 2024, arXiv 2310.01777).

    Fields that are None take the sizes of the authors' code: those for causal attention, or those for the other.

    slices: columns M of the estimate; each stands for 1 / M of the keys that a query sees. Best slices x budget >= N.
    budget: keys k per query and head; may be raised after training.
    budget_rule: "exact" shows a query that sees k keys or fewer all of them; "paper" is the authors' code.
    grouping: "causal_per_batch" lets all heads of a query compete for H k keys; "per_query" gives k to each head.
    shrink: columns of the estimate per column that the network computes; 4 causal, 2 else.
    channels: rows that the network computes per head; 2 causal, 4 else.
    features_divisor: there are D ln D / this random features; 8 causal, 1 else.
    positions: code of the positions in causal attention: "learned", a table of max_length rows; "fourier", fixed, of no
        limited length; "auto", learned up to a max_length of 8192.
    max_length: rows of the learned table; a longer sequence is an error.
    pooling: without a causal mask: "width" shares the weight of a slice among its keys, "paper" gives it whole to each.
    scale_bias: start of the two factors' logits; 4 starts near the teacher, 0 (as in the authors' code) at one half.
    strict_window: refuse a sliding window, because the estimate's running sums also hold older keys.
    seed: of the random features and of the estimator's first weights, which are the same in all layers.
    """

    variant: ClassVar[str] = "sea"

    slices: int = 256
    budget: int = 64
    budget_rule: Literal["exact", "paper"] = "exact"
    grouping: Literal["causal_per_batch", "per_query"] = "causal_per_batch"
    shrink: int | None = None
    channels: int | None = None
    features_divisor: int | None = None
    positions: Literal["auto", "learned", "fourier"] = "auto"
    max_length: int = 2048
    pooling: Literal["width", "paper"] = "width"
    scale_bias: float = 4.0
    strict_window: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slices", "budget", "shrink", "channels", "features_divisor", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise error("AR303", f"sea.{name} is {value}; it must be 1 or more")
        step = self.shrink or 4
        if self.slices % step:
            raise error("AR303", f"sea.slices is {self.slices}; it must be a multiple of shrink, {step}")

    @property
    def adds_parameters(self) -> bool:
        """The estimator of every layer."""
        return True

    @property
    def state_names(self) -> tuple[str, ...]:
        """Which keys are real."""
        return ("real",)

    @property
    def summary_names(self) -> tuple[str, ...]:
        """The estimator's sums, its last rows before either convolution, the real tokens, the sum of the values."""
        return ("sums", "outer", "inner", "length", "values")

    def new_state(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """No token is real yet; nothing is held where the estimator is not causal."""
        import torch

        return {"real": x.new_zeros(x.shape[:2], dtype=torch.bool)} if hasattr(holder, "kv_heads") else {}

    def new_summary(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return sums ``[B, Hkv, F, D + Dv + 1]`` and ``[B, Hkv, Dv]``, rows ``[B, ch H, 4, M / cs]``, counts ``[B]``.

        Sums are float32 (float64).
        """
        import torch

        from attnrewrite.kernels.sea.cnn import REACH

        estimator: Any = holder
        B, Hkv, (F, D) = x.shape[0], estimator.kv_heads.shape[0], estimator.features.shape
        Dv = (estimator.encode.weight.shape[1] - D) // 2
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = (B, estimator.cnn.first.weight.shape[0], REACH, estimator.cnn.norm.weight.shape[0])
        return {
            "sums": x.new_zeros(B, Hkv, F, D + Dv + 1, dtype=kind),
            "outer": x.new_zeros(rows, dtype=kind),
            "inner": x.new_zeros(rows, dtype=kind),
            "length": x.new_zeros(B, dtype=torch.int64),
            "values": x.new_zeros(B, Hkv, Dv, dtype=kind),
        }

    @property
    def draft_names(self) -> tuple[str, ...]:
        """The factors of what is summed up, and the rows before either convolution."""
        return ("drafted_keys", "drafted_values", "drafted_outer", "drafted_inner")

    def new_drafts(self, holder: torch.nn.Module | None, x: torch.Tensor, room: int) -> dict[str, torch.Tensor]:
        """Return ``[B, K, Hkv, F]``, ``[B, K, Hkv, D + Dv + 1]`` and twice ``[B, 4 + K, ch H, M / cs]``."""
        from attnrewrite.kernels.sea.cnn import REACH

        empty = self.new_summary(holder, x)
        sums, rows = empty["sums"], empty["outer"]
        B, Hkv, F, E = sums.shape
        strip = (B, REACH + room, rows.shape[1], rows.shape[3])
        shapes = ((B, room, Hkv, F), (B, room, Hkv, E), strip, strip)
        return {name: sums.new_zeros(shape) for name, shape in zip(self.draft_names, shapes, strict=True)}

    def taken_back(
        self, summary: Mapping[str, torch.Tensor], drafts: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, torch.Tensor]:
        """Return the summary without the last ``count`` tokens: less their part of the sums, and the rows before."""
        import torch

        from attnrewrite.kernels.sea.cnn import REACH

        keys, values, outer, inner = (drafts[name] for name in self.draft_names)
        keys, values = keys[:, -count:], values[:, -count:]
        plain = values[..., -1 - summary["values"].shape[-1] : -1]  # without the code of positions, and the count
        return {
            "sums": summary["sums"] - torch.einsum("bkhf,bkhe->bhfe", keys, values),
            "outer": outer[:, -count - REACH : -count].transpose(1, 2),
            "inner": inner[:, -count - REACH : -count].transpose(1, 2),
            "length": summary["length"] - values[:, :, 0, -1].sum(1).long(),
            "values": summary["values"] - plain.sum(1),
        }

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return the estimator of one layer, float32, at its start. Raises VariantError AR307 for symbolic sizes.

        Linear maps and convolutions start as torch's do, the two factors at sigmoid(scale_bias) for every query.
        """
        import torch

        sizes = site.sizes()
        H, Hkv, D, Dv = (sizes[name] for name in ("H", "Hkv", "D", "Dv"))
        if not all(isinstance(n, int) for n in (H, Hkv, D, Dv)):
            raise error("AR307", f"head counts and dims must be numbers, not {(H, Hkv, D, Dv)}", layer=site.layer)
        causal = site.visibility.facts.offset is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            holder = self._estimator(H, D, Dv, causal).float()
        if causal:
            holder.register_buffer("kv_heads", torch.zeros(Hkv, 0))  # says by its shape how large a cache's sums are
        return holder.to(device)

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the estimator with zeros."""
        import torch

        holder = torch.nn.Module()
        for path, shape in shapes.items():
            *folders, name = path.split(".")
            inner = holder
            for folder in folders:
                if folder not in dict(inner.named_children()):
                    inner.add_module(folder, torch.nn.Module())
                inner = inner.get_submodule(folder)
            if path in ("features", "kv_heads"):
                inner.register_buffer(name, torch.zeros(shape))
            else:
                inner.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        return holder

    def _estimator(self, H: int, D: int, Dv: int, causal: bool) -> torch.nn.Module:
        import torch
        from torch import nn

        from attnrewrite.kernels.sea.linear import draw_features, feature_count

        narrow = self.slices // (self.shrink or (4 if causal else 2))
        channels = self.channels or (2 if causal else 4)
        count = feature_count(D, self.features_divisor or (8 if causal else 1))
        holder = nn.ModuleDict(
            {
                "encode": nn.Linear(D + 2 * Dv, 2 * D),
                "norm": nn.LayerNorm(2 * D),
                "rows": nn.Linear(2 * D, channels * narrow),
                "scales": nn.Linear(2 * D, 2),
                "cnn": _causal_cnn(H, channels * H, narrow, self.slices) if causal else _cnn(H, channels * H),
            }
        )
        holder.register_buffer("features", draw_features(count, D, seed=self.seed))
        if causal and self._has_table():
            holder.register_parameter("positions", nn.Parameter(torch.randn(self.max_length, D)))
        nn.init.zeros_(holder.get_parameter("scales.weight"))
        nn.init.constant_(holder.get_parameter("scales.bias"), self.scale_bias)
        return holder

    def _has_table(self) -> bool:
        return self.positions == "learned" or (self.positions == "auto" and self.max_length <= LONGEST_TABLE)


def _causal_cnn(H: int, wide: int, narrow: int, slices: int) -> torch.nn.Module:
    from torch import nn

    return nn.ModuleDict(
        {
            "norm": nn.LayerNorm(narrow),
            "first": nn.Conv2d(wide, wide, 3),
            "second": nn.Conv2d(wide, wide, 3),
            "last": nn.Conv2d(wide, H, 1),
            "out_norm": nn.LayerNorm(slices),
        }
    )


def _cnn(H: int, wide: int) -> torch.nn.Module:
    from torch import nn

    return nn.ModuleDict(
        {"first": nn.Conv2d(wide, 4 * H, 3), "second": nn.Conv2d(4 * H, 4 * H, 3), "last": nn.Conv2d(4 * H, H, 3)}
    )
