"""Distillation: what a conversion added learns from the model itself, layer by layer, and nothing else changes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, build
from torch import nn

import attnrewrite
from attnrewrite import AttnRewriteError, SEAConfig, SelectiveConfig
from attnrewrite.conversion import new_parameters
from attnrewrite.distillation import output_error
from attnrewrite.joint_distillation import joint_steps
from attnrewrite.observation import observe
from attnrewrite.passes.rules.sdpa import exact
from attnrewrite.passes.rules.sea import estimate

BY_NAME = {family.name: family for family in FAMILIES}
LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]
SMALL = SEAConfig(slices=8, budget=3, max_length=32)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def teacher(family: Family) -> nn.Module:
    """A model whose attention is far from even: its queries are 30 times as long."""
    model = build(family, "sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "query" in name:
                parameter.mul_(30)
    return model


@pytest.mark.parametrize("family", [LLAMA, BERT], ids=lambda family: family.name)
def test_distillation_lowers_the_loss_of_every_layer_and_trains_the_estimator_alone(family: Family) -> None:
    model = teacher(family)
    batches = [{**family.inputs(), "input_ids": torch.randint(3, 64, (4, 12))} for _ in range(2)]
    attnrewrite.convert(model, SMALL, example_kwargs=batches[0])
    new = {name for name, _ in new_parameters(model)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[tuple[int, float]] = []
    record = attnrewrite.distill(model, batches, steps=30, lr=1e-2, progress=lambda *now: told.append(now))
    assert record.steps == len(told) == 30
    assert list(record.before) == list(record.after) == list(family.layers)
    assert all(record.after[layer] < 0.9 * record.before[layer] for layer in family.layers)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in new if ".scales." not in name}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_loss_is_that_of_the_definition() -> None:
    """At the start it equals 0.1 KL + MSE between the teacher's matrix and the estimate's, written out."""
    model = teacher(LLAMA).double()
    inputs = LLAMA.inputs()
    attnrewrite.convert(model, SMALL, example_kwargs=inputs)
    model.double()
    expected: dict[str, float] = {}

    def see(at: Any) -> None:
        t, M, n = at.tensors, SMALL.slices, 12
        k = t.key().repeat_interleave(2, 1)
        seen = torch.ones(n, n).tril().bool()
        A = (t.query() @ k.mT * t.site.scores.alpha).masked_fill(~seen, -torch.inf).softmax(-1)
        z = estimate(t, at.request.config)[0].estimated
        column = torch.zeros(n, n, dtype=torch.long)
        for i in range(n):
            edges = [(2 * m * (i + 1) + M) // (2 * M) for m in range(M + 1)]
            column[i] = torch.tensor([max(m for m in range(M) if edges[m] <= min(j, i)) for j in range(n)])
        own = z.gather(-1, column.expand(*z.shape[:2], n, n)).masked_fill(~seen, -torch.inf)
        student = own.softmax(-1)
        kl = torch.where(seen, A * (A.clamp(min=1e-300).log() - own.log_softmax(-1)), 0.0).sum(-1).mean()
        expected[at.site.layer] = float(0.1 * kl + (student - A).square().mean())

    observe(model, [inputs], see)
    record = attnrewrite.distill(model, [inputs], steps=1)
    assert record.before == pytest.approx(expected, rel=1e-9)


def test_distillation_stops_where_it_is_told_to_and_survives_an_interruption() -> None:
    model = teacher(LLAMA)
    batch = LLAMA.inputs()
    attnrewrite.convert(model, SMALL, example_kwargs=batch)
    record = attnrewrite.distill(model, [batch], steps=50, progress=lambda step, loss: step < 3)
    assert record.steps == 3

    def interrupt(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attnrewrite.distill(model, [batch], steps=50, progress=interrupt)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(**batch)[0].isfinite().all()


def test_other_variants_learn_the_output_of_their_layer() -> None:
    """Selective attention with a factor that is wrong moves it towards 0, where nothing is voted out."""
    model = teacher(LLAMA)
    attnrewrite.convert(model, SelectiveConfig(), example_kwargs=LLAMA.inputs())
    gammas = [p for _, p in new_parameters(model)]
    for gamma in gammas:
        nn.init.constant_(gamma, 0.5)
    record = attnrewrite.distill(model, [LLAMA.inputs()], steps=10, lr=2e-2, weight_decay=0.0)
    assert all(record.after[layer] < record.before[layer] for layer in LLAMA.layers)
    assert all(gamma.item() < 0.45 for gamma in gammas)


def test_what_cannot_be_distilled_is_named() -> None:
    model, batch = build(LLAMA, "sdpa"), LLAMA.inputs()
    with pytest.raises(AttnRewriteError, match="AR310"):
        attnrewrite.distill(model, [batch], steps=1)
    attnrewrite.convert(model, SelectiveConfig(mode="raw"), example_kwargs=batch)
    with pytest.raises(AttnRewriteError, match=r"AR102[^$]*0 parameters to train"):
        attnrewrite.distill(model, [batch], steps=1)
    attnrewrite.restore(model)
    attnrewrite.convert(model, SMALL, example_kwargs=batch)
    for batches, steps in (([], 1), ([batch], 0)):
        with pytest.raises(AttnRewriteError, match="AR102"):
            attnrewrite.distill(model, batches, steps=steps)


def test_the_command_trains_a_saved_conversion(folder: str, run_json: Any, run: Any, tmp_path: Path) -> None:
    start, out, text = tmp_path / "sea", tmp_path / "trained", tmp_path / "text.txt"
    text.write_text("The one who waits looks at the time, and the one who attends looks at the lamp. " * 3)
    settings = ("--set", "slices=8", "--set", "budget=4", "--set", "max_length=64")
    assert run("convert", folder, start, "--variant", "sea", *settings)[0] == 0
    words = ("distill", start, out, "--text", text, "--steps", 12, "--lr", 0.01, "--seq-len", 32)
    code, data = run_json(*words)
    assert (code, data["steps"], len(data["before"])) == (0, 12, 2)
    assert all(data["after"][layer] < loss for layer, loss in data["before"].items())
    loaded, before = attnrewrite.load_pretrained(out), attnrewrite.load_pretrained(start)
    added = {name for name, _ in new_parameters(loaded)}
    for (name, value), other in zip(loaded.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, other) == (name not in added or ".scales." in name), name
    assert (run_json(*words)[1]["error"]["code"], run(*words, "--overwrite")[0]) == ("AR601", 0)
    code, data = run_json("distill", folder, tmp_path / "no", "--seq-len", 32)
    assert (code, data["error"]["code"]) == (1, "AR310")


@pytest.mark.slow
def test_in_the_stage_of_all_weights_the_model_learns_from_a_copy_of_itself() -> None:
    model = teacher(LLAMA)
    ids = torch.randint(3, 64, (4, 12))
    batches = [{"input_ids": ids, "labels": ids, "use_cache": False}]
    attnrewrite.convert(model, SMALL, example_kwargs=LLAMA.inputs())
    new = {name for name, _ in new_parameters(model)}
    before = {name: value.clone() for name, value in model.state_dict().items()}

    told = list[float]()
    record = attnrewrite.distill(
        model, batches, steps=20, lr=1e-2, base_lr=1e-3, stage="all", progress=lambda _, loss: told.append(loss)
    )
    assert record.steps == len(told) == 20
    assert list(record.before) == list(record.after) == list(LLAMA.layers)
    assert all(record.after[layer] < 0.9 * record.before[layer] for layer in LLAMA.layers)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if name not in new} == {name for name, _ in model.named_parameters()} - new
    assert any(".scales." in name for name in moved)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(AttnRewriteError, match=r"AR102[^$]*stage is 'base'"):
        attnrewrite.distill(model, batches, steps=1, stage="base")  # type: ignore[arg-type]


def test_the_joint_loss_is_that_of_the_definition() -> None:
    """Before the first step a student with its teacher's weights has the dense attention of its teacher."""
    model = teacher(LLAMA).double()
    ids = LLAMA.inputs()["input_ids"]
    batch = {"input_ids": ids, "labels": ids, "use_cache": False, "output_hidden_states": True}
    theirs = model(**batch)
    attnrewrite.convert(model, SMALL, example_kwargs=LLAMA.inputs())
    model.double()
    alone = attnrewrite.distill(model, [batch], steps=1, lr=0.0, weight_decay=0.0).before
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    ours = model(**batch)
    step = next(joint_steps(model, [batch]))
    first = LLAMA.layers[0]
    observe(model, [batch], lambda at: outputs.append((output_error(at), exact(at.tensors))))
    ctx = float(outputs[0][0]) * float(outputs[0][1].square().mean())
    assert step.layers[first] == pytest.approx(alone[first] + ctx, rel=1e-6)
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    hidden = torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
    p, q = theirs.logits.softmax(-1), ours.logits.softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    own = float((5 * hidden + 0.2 * kl + 0.1 * ours.loss).detach())
    assert float(step.total.detach()) == pytest.approx(statistics.fmean(step.layers.values()) + own, rel=1e-5)


@pytest.mark.slow
def test_other_variants_have_the_stage_of_all_weights_too() -> None:
    model = teacher(LLAMA)
    attnrewrite.convert(model, SelectiveConfig(), example_kwargs=LLAMA.inputs())
    for _, gamma in new_parameters(model):
        nn.init.constant_(gamma, 0.5)
    record = attnrewrite.distill(model, [LLAMA.inputs()], steps=10, lr=2e-2, base_lr=1e-4, stage="all")
    assert all(record.after[layer] < record.before[layer] for layer in LLAMA.layers)
