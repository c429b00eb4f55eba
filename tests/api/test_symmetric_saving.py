"""Symmetric attention in files: only what is left, bit-exact, and damaged ones are named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import rows
from safetensors.torch import load_file, save_file
from spellings import WIDTH, NanoGPT
from symmetric_models import ALL, SYMMETRIC, model_of, untouched
from torch import Tensor, nn

import attnrewrite
from attnrewrite import AttnRewriteError, SymmetricConfig
from attnrewrite.conversion import conversion_of, new_parameters
from attnrewrite.saving import CONFIG, WEIGHTS, save_conversion

X = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:AR320")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


SAVED = [("llama", ALL), ("gpt2", SYMMETRIC), ("bert", ALL), ("gpt_neox", ALL)]


@pytest.mark.parametrize(("name", "config"), rows(SAVED, quick=SAVED[:2]), ids=str)
def test_saved_and_loaded_alone_or_into_the_base(tmp_path: Path, name: str, config: SymmetricConfig) -> None:
    model, inputs = model_of(name)
    base = copy.deepcopy(model)
    attnrewrite.convert(model, config, example_kwargs=inputs)
    with torch.no_grad():
        for _, parameter in new_parameters(model):
            parameter.add_(0.01 * torch.randn(parameter.shape))
    expected = model(**inputs)[0]
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    alone = attnrewrite.load_pretrained(folder)
    into = attnrewrite.load_pretrained(copy.deepcopy(base), folder)
    for loaded in (alone, into):
        assert conversion_of(loaded) == conversion_of(model)
        assert attnrewrite.fit_errors(loaded) == attnrewrite.fit_errors(model)
        assert torch.equal(loaded(**inputs)[0], expected)
    assert torch.equal(attnrewrite.restore(into)(**inputs)[0], base(**inputs)[0])
    with pytest.raises(AttnRewriteError, match="AR322"):
        attnrewrite.restore(alone)
    again = attnrewrite.load_pretrained(attnrewrite.save_pretrained(alone, tmp_path / "again"))
    assert torch.equal(again(**inputs)[0], expected)


def test_the_command_line_writes_what_is_left(tmp_path: Path) -> None:
    model, inputs = model_of("llama")
    base = tmp_path / "base"
    model.save_pretrained(base)
    (base / "notes.txt").write_text("mine")
    attnrewrite.convert(model, ALL, example_kwargs=inputs)
    out = save_conversion(model, base, tmp_path / "out")
    assert (out / "notes.txt").read_text() == "mine"
    assert not any("q_proj" in key for key in load_file(out / "model.safetensors"))
    assert torch.equal(attnrewrite.load_pretrained(out)(**inputs)[0], model(**inputs)[0])


def test_a_part_of_another_model_is_saved_by_its_path_there() -> None:
    inner, inputs = model_of("bert")
    attnrewrite.convert(inner, ALL, example_kwargs=inputs)
    whole = nn.ModuleDict({"inner": inner})
    assert all(n.startswith("inner.encoder") for n, _ in new_parameters(whole))
    attnrewrite.restore(whole)
    assert conversion_of(inner) is None
    assert isinstance(inner.encoder.layer[0].attention.self.query, nn.Linear)


def test_every_damaged_file_is_named_and_the_base_untouched(tmp_path: Path) -> None:
    model = NanoGPT()
    base = copy.deepcopy(model)
    attnrewrite.convert(model, ALL, example_inputs=(X,))
    whole = attnrewrite.save_pretrained(model, tmp_path / "whole")

    def load_after(change: Callable[[Path], object]) -> str:
        folder = attnrewrite.save_pretrained(model, tmp_path / "out", overwrite=True)
        change(folder)
        return untouched(base, lambda: attnrewrite.load_pretrained(base, folder)).code

    def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            found = load_file(folder / WEIGHTS)
            change(found)
            save_file(found, folder / WEIGHTS)

        return damage

    def details(**changes: Any) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            data = json.loads((folder / CONFIG).read_text())
            data["sites"][0]["swap"].update(changes)
            (folder / CONFIG).write_text(json.dumps(data))

        return damage

    def without_details(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        del data["sites"][0]["swap"]
        (folder / CONFIG).write_text(json.dumps(data))

    assert load_after(weights(lambda found: found.pop("c_attn.pair"))) == "AR603"
    assert load_after(weights(lambda found: found.update({"c_attn.pair": torch.zeros(4, 8, 7)}))) == "AR603"
    assert load_after(weights(lambda found: found.update({"c_attn.more": torch.zeros(4)}))) == "AR603"
    assert load_after(details(query="c_atn", key="c_atn")) == "AR603"
    assert load_after(details(query="attn_dropout", key="attn_dropout")) == "AR603"
    assert load_after(details(heads=40)) in ("AR603", "AR604")
    assert load_after(details(heads="4")) == "AR604"
    assert load_after(without_details) == "AR603"
    assert load_after(lambda folder: (folder / WEIGHTS).unlink()) == "AR602"
    assert torch.equal(attnrewrite.load_pretrained(base, whole)(X), model(X))


def test_base_files_that_lack_more_than_was_replaced_are_refused(tmp_path: Path) -> None:
    model, inputs = model_of("llama")
    attnrewrite.convert(model, ALL, example_kwargs=inputs)
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    del found["model.layers.0.self_attn.v_proj.weight"]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AttnRewriteError, match=r"AR602.*\n.*lacks 1 weights.*v_proj"):
        attnrewrite.load_pretrained(folder)
