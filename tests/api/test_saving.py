"""Saving and loading conversions: bit-exact, atomic, and honest about damaged or strange files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from spellings import WIDTH, NanoGPT
from torch import Tensor, nn

import attnrewrite
from attnrewrite import AttnRewriteError, AttnRewriteWarning, SelectiveConfig, SSAConfig
from attnrewrite.conversion import conversion_of, new_parameters
from attnrewrite.saving import CONFIG, REPORT, WEIGHTS, is_conversion, save_conversion

X = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(0))
LLAMA = FAMILIES[0]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def converted(config: Any = None) -> nn.Module:
    """Return a converted nanoGPT attention whose new parameters have been trained away from their start."""
    model = NanoGPT()
    attnrewrite.convert(model, config or SSAConfig(), example_inputs=(X,))
    with torch.no_grad():
        for _, parameter in new_parameters(model):
            parameter.add_(torch.randn(parameter.shape))
    return model


def base_of(model: nn.Module) -> nn.Module:
    base = NanoGPT()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if k in base.state_dict()})
    return base


@pytest.mark.parametrize("config", [SSAConfig(), SSAConfig(position="sigmoid"), SelectiveConfig()], ids=str)
def test_round_trip_into_the_base_is_bit_exact(tmp_path: Path, config: Any) -> None:
    model = converted(config)
    expected = model(X)
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, REPORT]
    assert is_conversion(folder)
    loaded = attnrewrite.load_pretrained(base_of(model), folder)
    assert conversion_of(loaded) == conversion_of(model)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(loaded(X), expected)


def test_a_conversion_without_parameters_is_saved_too(tmp_path: Path) -> None:
    model = converted(SelectiveConfig(mode="raw"))
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    assert torch.equal(attnrewrite.load_pretrained(base_of(model), folder)(X), model(X))


def test_a_transformers_model_is_saved_whole_and_loaded_from_its_folder(tmp_path: Path) -> None:
    model, inputs = build(LLAMA, "sdpa"), LLAMA.inputs()
    attnrewrite.convert(model, SSAConfig(), example_kwargs=inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    expected = model(**inputs)[0]
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    loaded = attnrewrite.load_pretrained(folder)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(**inputs)[0], expected)


def test_base_files_are_copied_untouched(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = build(LLAMA, "sdpa")
    model.save_pretrained(base)
    files = {p.name: p.read_bytes() for p in base.iterdir()}
    attnrewrite.convert(model, SelectiveConfig(), example_kwargs=LLAMA.inputs())
    out = save_conversion(model, base, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in base.iterdir()} == files
    assert {name: (out / name).read_bytes() for name in files} == files
    assert conversion_of(attnrewrite.load_pretrained(out)) == conversion_of(model)


def code_of(action: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(AttnRewriteError) as caught:
        action()
    return caught.value.code, str(caught.value)


def test_nothing_is_overwritten_unasked_and_a_failure_leaves_no_trace(tmp_path: Path) -> None:
    model, out = converted(), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert code_of(lambda: attnrewrite.save_pretrained(model, out))[0] == "AR601"
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    attnrewrite.save_pretrained(model, out, overwrite=True)
    assert is_conversion(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_save_leaves_no_half_written_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrewrite import saving

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = converted()
    attnrewrite.save_pretrained(model, tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(saving, "save_file", interrupted)
    for target in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            attnrewrite.save_pretrained(model, tmp_path / target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def damaged(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**data, **changes}))


def test_every_damaged_or_strange_file_is_named_and_the_model_untouched(tmp_path: Path) -> None:
    model = converted()
    base = base_of(model)

    def load_after(change: Callable[[Path], Any], into: nn.Module | None = None) -> tuple[str, str]:
        folder = attnrewrite.save_pretrained(model, tmp_path / "out", overwrite=True)
        change(folder)
        target = into or base
        keys = set(target.state_dict())
        found = code_of(lambda: attnrewrite.load_pretrained(target, folder))
        assert set(target.state_dict()) == keys
        return found

    def site(**changes: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            entry = json.loads((folder / CONFIG).read_text())["sites"][0]
            damaged(folder, sites=[{**entry, **changes}])

        return change

    def cut(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40])

    assert load_after(lambda f: (f / CONFIG).unlink())[0] == "AR602"
    assert load_after(lambda f: (f / CONFIG).write_text('{"schema_'))[0] == "AR602"
    assert load_after(lambda f: (f / WEIGHTS).unlink())[0] == "AR602"
    assert load_after(cut)[0] == "AR602"
    assert load_after(lambda f: (f / WEIGHTS).write_bytes(b"PK not a safetensors file"))[0] == "AR602"
    assert load_after(lambda f: damaged(f, schema_version=99))[0] == "AR604"
    assert load_after(lambda f: (f / CONFIG).write_text("[]"))[0] == "AR604"
    assert load_after(site(layer="attn"))[0] == "AR603"
    assert load_after(site(parameters={"q_gate": [4, 9], "v_gate": [4, 8], "q_gain": [], "v_gain": []}))[0] == "AR603"
    code, text = load_after(site(config={"variant": "ssa", "gates": "head"}))
    assert (code, "did you mean 'gate'" in text) == ("AR302", True)
    assert load_after(lambda f: None, into=nn.Linear(3, 3))[0] == "AR603"
    assert load_after(lambda f: None, into=model)[0] == "AR305"
    assert code_of(lambda: attnrewrite.load_pretrained(tmp_path / "nowhere"))[0] == "AR602"
    assert code_of(lambda: attnrewrite.save_pretrained(NanoGPT(), tmp_path / "plain"))[0] == "AR310"


def test_unknown_metadata_is_a_warning(tmp_path: Path) -> None:
    model = converted()
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    damaged(folder, author="someone")
    with pytest.warns(AttnRewriteWarning, match="author"):
        loaded = attnrewrite.load_pretrained(base_of(model), folder)
    out: Tensor = loaded(X)
    assert torch.equal(out, model(X))
