"""The tables in docs/variants.md: ``python benchmarks/variant_tables.py docs/variants.md`` writes them anew."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from attnrewrite import (
    AttnRewriteError,
    RoutingConfig,
    SdpaConfig,
    SEAConfig,
    SelectiveConfig,
    SSAConfig,
    SymmetricConfig,
    VariantConfig,
    calibrate,
    convert,
)
from attnrewrite.explanation import capture_model
from attnrewrite.observation import Observed, observe
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.matching.match import match
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.sdpa import exact

BEGIN, END = "<!-- Made by `make docs`: begin -->", "<!-- Made by `make docs`: end -->"
MODES: dict[str, VariantConfig] = {
    "sdpa": SdpaConfig(),
    "selective": SelectiveConfig(),
    "selective, new-head": SelectiveConfig(mode="new-head"),
    "selective, selector": SelectiveConfig(mode="selector"),
    "selective, raw": SelectiveConfig(mode="raw"),
    "ssa": SSAConfig(),
    "symmetric": SymmetricConfig(form="symmetric", max_error=1.0),
    "symmetric, pairwise": SymmetricConfig(max_error=1.0),
    "routing": RoutingConfig(clusters=8, window_size=128),
    "sea": SEAConfig(),
}
"""What the tables show; layers with random weights have no shared projection that is close, so max_error allows any."""

FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}
"""The CPU's fused attention, which torch does not count, as torch counts the others."""

MODEL, HEADS, LENGTH = 768, 12, 1024
"""The layer whose costs are stated: BERT's and GPT-2's; the length is that of GPT-2."""


class Layer(nn.Module):
    """Self-attention, or cross-attention with ``memory``; ``how`` are arguments of torch's fused attention."""

    def __init__(self, width: int = MODEL, heads: int = HEADS, kv_heads: int = 0, **how: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.how = heads, kv_heads or heads, how
        head = width // heads
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(width, self.kv_heads * head) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend, [B, L, width]."""
        source = x if memory is None else memory
        q, k, v = (
            make(y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for make, y, heads in (
                (self.q_proj, x, self.heads),
                (self.k_proj, source, self.kv_heads),
                (self.v_proj, source, self.kv_heads),
            )
        )
        out: Tensor = self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, [B, H, L, D]."""
        return F.scaled_dot_product_attention(q, k, v, mask, **self.how)


class SoftCapped(Layer):
    """Causal attention whose scores are capped as in Gemma 2."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, [B, H, L, D]."""
        scores = 30.0 * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / 30.0)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


class WithSinks(Layer):
    """Causal attention with one more logit per head, which takes weight and gives no value, as in GPT-OSS."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.sinks = nn.Parameter(torch.zeros(heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, [B, H, L, D]."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        column = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        joined = torch.cat([scores.masked_fill(later, float("-inf")), column], -1)
        return joined.softmax(-1)[..., :-1] @ v


class Continued(Layer):
    """Causal attention behind keys and values of earlier calls, [B, H, P, D], which take the place of a mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, [B, H, L, D]."""
        assert mask is not None
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(mask.shape[2] + k.shape[2])[None]
        k, v = torch.cat([mask, k], 2), torch.cat([mask, v], 2)
        return F.scaled_dot_product_attention(q, k, v, j <= i + mask.shape[2])


class Masked(Layer):
    """Attention under a mask that ``kind`` names."""

    def __init__(self, kind: str, **how: Any) -> None:
        super().__init__(32, 4, **how)
        self.kind = kind

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, [B, H, L, D]."""
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        seen = j <= i if self.kind != "bidirectional, padding" else j >= 0
        if self.kind == "causal, window":
            seen = seen & (j > i - 4)
        if self.kind.endswith("padding") and mask is not None:
            seen = seen & mask[:, None, None, :]
        if self.kind == "causal, packed documents" and mask is not None:
            seen = seen & (mask[:, None, :, None] == mask[:, None, None, :])
        if self.kind == "causal, ALiBi":
            scores = q @ k.mT * q.shape[-1] ** -0.5 + 2.0 ** -torch.arange(1.0, 5.0)[:, None, None] * (j - i)
            return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, seen)


def cases() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Return what a layer may be, with inputs."""
    x, longer = torch.randn(2, 12, 32), torch.randn(2, 16, 32)
    real = torch.arange(12)[None] >= torch.tensor([[0], [3]])
    documents = (torch.arange(12)[None] >= 5).long().expand(2, -1)
    small = {"width": 32, "heads": 4}
    return {
        "causal": (Layer(**small, is_causal=True), (x,)),
        "bidirectional": (Layer(**small), (x,)),
        "causal, window": (Masked("causal, window"), (x,)),
        "causal, padding": (Masked("causal, padding"), (x, None, real)),
        "bidirectional, padding": (Masked("bidirectional, padding"), (x, None, real)),
        "causal, packed documents": (Masked("causal, packed documents"), (x, None, documents)),
        "causal, grouped heads": (Layer(**small, kv_heads=2, is_causal=True, enable_gqa=True), (x,)),
        "bidirectional, grouped heads": (Layer(**small, kv_heads=2, enable_gqa=True), (x,)),
        "causal, ALiBi": (Masked("causal, ALiBi"), (x,)),
        "causal, soft cap": (SoftCapped(**small), (x,)),
        "causal, sinks": (WithSinks(**small), (x,)),
        "any mask": (Layer(**small), (x, None, torch.rand(2, 1, 12, 12) > 0.3)),
        "cross-attention": (Layer(**small), (x, longer)),
        "queries that continue a cache": (Continued(**small), (x, None, torch.randn(2, 4, 5, 8))),
    }


def behaviour() -> Iterator[str]:
    """Yield the table of what each covers: "yes", or the code of the refusal."""
    yield f"| the layer | {' | '.join(MODES)} |"
    yield "| --- |" + " --- |" * len(MODES)
    for title, (layer, inputs) in cases().items():
        sites = match(capture_model(layer.eval(), inputs, {})).attentions
        assert len(sites) == 1, title
        yield f"| {title} | {' | '.join(_covers(config, sites[0], layer, inputs) for config in MODES.values())} |"


def _covers(config: VariantConfig, site: Attention, layer: nn.Module, inputs: tuple[Any, ...]) -> str:
    settings = config.to_dict()
    try:
        RULES[config.variant].check(site, Request(settings.pop("variant"), settings))
        if config.swaps_modules and not isinstance(layer, Continued):  # the projections decide, too, without a cache
            _converted(layer, config, inputs)
    except (Reject, AttnRewriteError) as refused:
        return "as written" if config.variant == "sdpa" else refused.code
    return "yes"


def _converted(layer: nn.Module, config: VariantConfig, inputs: tuple[Any, ...]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(copy.deepcopy(layer), config, example_inputs=inputs, verify=False)


def costs() -> Iterator[str]:
    """Yield the table of what each adds to one layer, and what it costs beside plain attention."""
    yield "| | parameters | other state | forward FLOPs | backward FLOPs | kept for backward |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for title, config in MODES.items():
        layer, x = Layer(is_causal=True).eval(), torch.randn(1, LENGTH, MODEL)
        host = sum(p.numel() for p in layer.parameters())
        converted = layer if config.variant == "sdpa" else _converted(layer, config, (x,))
        if config.learns_from_inputs:
            calibrate(converted, [x])
        added = sum(p.numel() for p in converted.parameters()) - host
        state = sum(b.numel() for b in converted.buffers())
        plain, ours = _work(converted, x)
        ratios = " | ".join(f"{b / a:.3g} x" for a, b in zip(plain, ours, strict=True))
        yield f"| {title} | {added:+,} ({100 * added / host:+.3g} %) | {state:,} | {ratios} |"


def _work(model: nn.Module, x: Tensor) -> tuple[list[float], list[float]]:
    """Return FLOPs forward, FLOPs backward and bytes kept, of plain attention and of what the model carries."""
    found: list[list[float]] = []

    def see(at: Observed) -> None:
        with torch.enable_grad():
            tensors = copy.copy(at.tensors)
            tensors.values = {n: _leaf(value) for n, value in at.tensors.values.items()}
            own = at.request.parameters
            tensors.extra = {key: x if key in own else _leaf(x) for key, x in at.tensors.extra.items()}
            found.extend(
                _count(lambda f=f: f(tensors)) for f in (exact, RULES[at.request.variant].function(at.request))
            )

    observe(model, [x], see)
    plain, ours = found
    return plain, ours


def _leaf(value: Any) -> Any:
    whole = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if whole else value


def _count(attend: Callable[[], Tensor]) -> list[float]:
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no later one comes to lie at the same address

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with (
        FlopCounterMode(display=False, custom_mapping=FUSED) as forward,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        out = attend()
    with FlopCounterMode(display=False, custom_mapping=FUSED) as backward:
        out.sum().backward()
    return [forward.get_total_flops(), backward.get_total_flops(), sum(storage.nbytes() for storage in kept.values())]


_COSTS = f"""One causal layer of width {MODEL} with {HEADS} heads at N = {LENGTH}: parameters and numbers in buffers
that are added, and, beside plain fused attention, floating-point operations (as torch counts them: matrix products
and convolutions) and bytes kept for the backward pass."""


def tables() -> str:
    """Return what stands between the two marks of the page."""
    torch.manual_seed(0)
    return "\n".join(
        [
            BEGIN,
            "",
            _COSTS,
            "",
            *costs(),
            "",
            "What each covers; a code is a refusal, and *as written* leaves the layer's own operations in place.",
            "",
            *behaviour(),
            "",
            END,
        ]
    )


def renewed(page: str) -> str:
    """Return the page with its tables made anew."""
    before, rest = page.split(BEGIN)
    return before + tables() + rest.split(END)[1]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("page", type=click.Path(path_type=Path, dir_okay=False, exists=True))
def main(page: Path) -> None:
    """Write the tables of PAGE anew."""
    try:
        text = renewed(page.read_text(encoding="utf-8"))
    except AttnRewriteError as failure:
        raise click.ClickException(str(failure)) from failure
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
