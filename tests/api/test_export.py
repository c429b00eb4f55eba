"""Export: programs of torch.export and MLIR that compute what the model computes, and files written whole or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from mlir_runner import Program
from spellings import WIDTH, NanoGPT
from torch import Tensor, nn
from torch.export import Dim

import attnrewrite
from attnrewrite import AttnRewriteError, SelectiveConfig, SSAConfig
from attnrewrite.conversion import new_parameters
from attnrewrite.exporting import FORMATS

KNOWN = {family.name: family for family in FAMILIES}
BATCH, LENGTH = Dim("B", min=2, max=8), Dim("L", min=2, max=64)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def made(name: str, config: Any = None, implementation: str = "eager") -> nn.Module:
    """Return a tiny model, converted with parameters that have moved away from their start."""
    model = build(KNOWN[name], implementation)
    if config is not None:
        attnrewrite.convert(model, config, example_kwargs={"input_ids": tokens()})
        with torch.no_grad():
            for _, parameter in new_parameters(model):
                parameter.normal_(std=0.3)
    return model


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def first(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids)[0]
    return out


def exported(model: nn.Module, path: Path, format: Any, axes: dict[int, Any], **options: Any) -> Path:
    shapes = {"input_ids": axes}
    return attnrewrite.export(
        model, (), path, format, example_kwargs={"input_ids": tokens()}, dynamic_shapes=shapes, **options
    )


MODELS = [
    ("llama", SelectiveConfig()),
    *(pytest.param(name, SSAConfig(), marks=pytest.mark.slow) for name in ("gpt2", "bert")),
]


# --- programs of torch.export ---


@pytest.mark.parametrize(("name", "config"), MODELS, ids=str)
def test_program_computes_what_the_model_computes_at_other_sizes(name: str, config: Any, tmp_path: Path) -> None:
    model = made(name, config)
    path = exported(model, tmp_path / "model.pt2", "pt2", {0: BATCH, 1: LENGTH})
    assert path == tmp_path / "model.pt2"
    assert list(tmp_path.iterdir()) == [path]
    program = torch.export.load(path)
    assert not [node for node in program.graph.nodes if "attnrewrite" in str(node.target)]
    for ids in (tokens(), tokens(3, 12)):
        out = program.module()(input_ids=ids)
        assert type(out) is dict
        torch.testing.assert_close(next(iter(out.values())), first(model, ids), **EXACT)


_FRESH = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(input_ids=torch.load(sys.argv[2]))["logits"], sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] in ("attnrewrite", "transformers")]
"""
_WITH_OPERATORS = "import attnrewrite.functional\n" + "\n".join(_FRESH.splitlines()[:-1])


@pytest.mark.parametrize(
    ("keep", "code"),
    [
        pytest.param(False, _FRESH, id="plain"),
        pytest.param(True, _WITH_OPERATORS, id="operators", marks=pytest.mark.slow),
    ],
)
def test_program_runs_in_a_fresh_process(keep: bool, code: str, tmp_path: Path) -> None:
    model, ids = made("llama", SelectiveConfig()), tokens(3, 12)
    path = exported(model, tmp_path / "model.pt2", "pt2", {0: BATCH, 1: LENGTH}, keep_operators=keep)
    targets = [str(node.target) for node in torch.export.load(path).graph.nodes]
    assert targets.count("attnrewrite.selective_attention.default") == 2 * keep
    torch.save(ids, tmp_path / "ids")
    command = [sys.executable, "-P", "-c", code, path, tmp_path / "ids", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out"), first(model, ids), **EXACT)


def test_sites_get_the_exact_rewrite_or_stay(tmp_path: Path) -> None:
    reports: list[attnrewrite.Report] = []
    exported(made("llama"), tmp_path / "a.pt2", "pt2", {}, report=reports.append)
    exported(made("gemma2"), tmp_path / "b.pt2", "pt2", {}, report=reports.append)
    assert [report.summary["rewritten"] for report in reports] == [2, 0]
    assert [report.model for report in reports] == ["LlamaForCausalLM", "Gemma2ForCausalLM"]
    assert torch.allclose(
        torch.export.load(tmp_path / "b.pt2").module()(input_ids=tokens())["logits"],
        first(made("gemma2"), tokens()),
        atol=1e-5,
    )


def test_model_that_is_itself_the_attention(tmp_path: Path) -> None:
    model, x = NanoGPT(), torch.randn(2, 13, WIDTH)
    attnrewrite.convert(model, SSAConfig(), example_inputs=(x,))
    path = attnrewrite.export(model, (x,), tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x))


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, x = NanoGPT(), torch.randn(2, 13, WIDTH)
    attnrewrite.convert(model, SelectiveConfig(), example_inputs=(x,))
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    attnrewrite.export(model, (x,), tmp_path / "model.pt2")
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_program_that_was_captured_before(tmp_path: Path) -> None:
    model = made("llama")
    program = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}, strict=False)
    path = attnrewrite.export(program, (), tmp_path / "model.pt2")
    out = torch.export.load(path).module()(input_ids=tokens(), use_cache=False)
    torch.testing.assert_close(out["logits"], first(model, tokens()), **EXACT)
    with pytest.raises(AttnRewriteError) as caught:
        attnrewrite.export(program, (tokens(),), tmp_path / "other.pt2")
    assert caught.value.code == "AR102"


class Regions(nn.Module):
    """A part under autocast, and one without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = NanoGPT()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = x.mean().sigmoid()
        with torch.autocast("cpu", torch.bfloat16):
            attended = self.attention(x)
        return attended.float() * factor


def test_regions_of_autocast_and_grad_mode(tmp_path: Path) -> None:
    model, x = Regions(), torch.randn(2, 13, WIDTH)
    program = torch.export.export(model, (x,), strict=False)
    for source, inputs in ((program, ()), (model, (x,))):
        path = attnrewrite.export(source, inputs, tmp_path / "model.pt2", overwrite=True)
        torch.testing.assert_close(torch.export.load(path).module()(x), model(x), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = made("llama", SelectiveConfig())
    path = exported(model, tmp_path / "model.pt2", "pt2", {1: LENGTH})
    package = torch._inductor.aoti_compile_and_package(
        torch.export.load(path), package_path=str(tmp_path / "compiled.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    for ids in (tokens(), tokens(length=12)):
        torch.testing.assert_close(compiled(input_ids=ids)["logits"], first(model, ids), **EXACT)


# --- MLIR ---


@pytest.mark.parametrize(("name", "config"), MODELS, ids=str)
def test_linalg_is_executed_at_other_lengths(name: str, config: Any, tmp_path: Path) -> None:
    model = made(name, config)
    program = Program(exported(model, tmp_path / "model.mlir", "mlir-linalg", {1: LENGTH}))
    for ids in (tokens(), tokens(length=12)):
        torch.testing.assert_close(program(ids)[0], first(model, ids), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [("llama", None), ("llama", SSAConfig()), ("gpt2", SelectiveConfig()), ("bert", None)],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_linalg_of_other_conversions(name: str, config: Any, implementation: str, tmp_path: Path) -> None:
    model = made(name, config, implementation)
    program = Program(exported(model, tmp_path / "model.mlir", "mlir-linalg", {1: LENGTH}))
    for ids in (tokens(), tokens(length=12)):
        torch.testing.assert_close(program(ids)[0], first(model, ids), **EXACT)


@pytest.mark.slow
def test_linalg_with_batch_and_length_open(tmp_path: Path) -> None:
    model = made("llama", SelectiveConfig())
    program = Program(exported(model, tmp_path / "model.mlir", "mlir-linalg", {0: BATCH, 1: LENGTH}))
    for ids in (tokens(), tokens(3, 12)):
        torch.testing.assert_close(program(ids)[0], first(model, ids), **EXACT)


class Folded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, x.shape[-1]) + 1


def test_views_that_torch_mlir_lowers_wrongly_are_refused(tmp_path: Path) -> None:
    x, shapes = torch.randn(2, 7, 4), ({0: BATCH, 1: LENGTH},)
    with pytest.raises(AttnRewriteError) as caught:
        attnrewrite.export(Folded(), (x,), tmp_path / "model.mlir", "mlir-linalg", dynamic_shapes=shapes)
    assert (caught.value.code, caught.value.source.partition(":")[0]) == ("AR605", "api/test_export.py")
    attnrewrite.export(Folded(), (x,), tmp_path / "model.mlir", "mlir-torch", dynamic_shapes=shapes)
    assert "torch.aten.view" in (tmp_path / "model.mlir").read_text()


def test_torch_dialect(tmp_path: Path) -> None:
    path = attnrewrite.export(NanoGPT(), (torch.randn(2, 13, WIDTH),), tmp_path / "model.mlir", "mlir-torch")
    text = path.read_text()
    assert "func.func @main(%arg0: !torch.vtensor<[2,13," in text
    assert "torch.operator" not in text


# --- what is refused ---


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("model", "inputs", "options", "code", "said"),
    [
        (Strange(), (X,), {"format": "mlir-linang"}, "AR102", "did you mean 'mlir-linalg'?"),
        (Strange(), (X,), {"format": "mlir-torch", "keep_operators": True}, "AR102", "keep_operators"),
        (Strange(), X, {}, "AR102", "pass a tuple"),
        (len, (X,), {}, "AR102", "torch.nn.Module"),
        (Strange(), (X, X), {}, "AR104", "positional argument"),
        (Branching(), (X,), {}, "AR105", "torch.export"),
        (Strange(), (X,), {"dynamic_shapes": ({0: Dim("n", min=5)},)}, "AR105", "torch.export"),
        (Strange(), (X,), {"format": "mlir-linalg"}, "AR605", "aten.special_bessel_j0"),
    ],
    ids=["format", "keep", "tensor", "function", "inputs", "branch", "dynamic", "operator"],
)
def test_bad_input(model: Any, inputs: Any, options: Any, code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(AttnRewriteError) as caught:
        attnrewrite.export(model, inputs, tmp_path / "model.out", **options)
    assert caught.value.code == code
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_refused_operator_comes_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(AttnRewriteError) as caught:
        attnrewrite.export(Strange(), (X,), tmp_path / "model.mlir", "mlir-linalg")
    assert "test_export.py:" in caught.value.source


def test_converted_model_with_wrong_inputs_names_the_inputs(tmp_path: Path) -> None:
    model = made("llama", SelectiveConfig())
    with pytest.raises(AttnRewriteError) as caught:
        attnrewrite.export(model, (tokens().float(),), tmp_path / "model.pt2")
    assert caught.value.code == "AR104"
    assert "AR308" not in str(caught.value)


def test_existing_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("mine")
    for format in FORMATS:
        with pytest.raises(AttnRewriteError) as caught:
            attnrewrite.export(Strange(), (X,), path, format)
        assert caught.value.code == "AR601"
    with pytest.raises(AttnRewriteError, match="AR605"):
        attnrewrite.export(Strange(), (X,), path, "mlir-linalg", overwrite=True)
    assert path.read_text() == "mine"
    attnrewrite.export(Strange(), (X,), path, overwrite=True)
    torch.testing.assert_close(torch.export.load(path).module()(X), Strange()(X))
    with pytest.raises(AttnRewriteError) as caught:
        attnrewrite.export(Strange(), (X,), tmp_path, overwrite=True)
    assert caught.value.code == "AR601"


def test_without_torch_mlir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    with pytest.raises(AttnRewriteError) as caught:
        attnrewrite.export(Strange(), (X,), tmp_path / "model.mlir", "mlir-linalg")
    assert (caught.value.code, caught.value.hint) == ("AR106", "pip install 'attnrewrite[mlir]'")
    assert not list(tmp_path.iterdir())


# --- on the command line ---


def test_folder_to_program(run_json: Any, folder: str, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    code, data = run_json("export", folder, out, "--dynamic", "--batch", "2", "--seq-len", "8")
    assert code == 0
    assert data["bytes"] == out.stat().st_size
    assert data["sites"] == {f"model.layers.{n}.self_attn": "sdpa" for n in range(2)}
    program = torch.export.load(out).module()
    assert program(input_ids=tokens(3, 12), use_cache=False)["logits"].shape == (3, 12, 96)


@pytest.mark.slow
def test_conversion_to_mlir_by_way_of_a_program(run: Any, run_json: Any, folder: str, tmp_path: Path) -> None:
    assert run("convert", folder, tmp_path / "ssa", "--variant", "ssa", "--format", "quiet")[0] == 0
    code, data = run_json("export", tmp_path / "ssa", tmp_path / "model.pt2", "--seq-len", "8")
    assert (code, set(data["sites"].values())) == (0, {"ssa"})
    code, out, _ = run("export", tmp_path / "model.pt2", tmp_path / "model.mlir", "--to", "mlir-linalg")
    assert code == 0
    assert f"wrote {tmp_path / 'model.mlir'}: mlir-linalg" in out
    again = attnrewrite.load_pretrained(tmp_path / "ssa")
    ids = tokens(1, 8)
    torch.testing.assert_close(Program(tmp_path / "model.mlir")(ids)[0], first(again, ids), **EXACT)


def test_wrong_words(run: Any, folder: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    code, _, err = run("export", folder, tmp_path / "there", "--format", "json")
    assert code == 1
    code, out, err = run("export", folder, tmp_path / "there")
    assert (code, out) == (1, "")
    assert err.startswith("AR601 ")
    code, _, err = run("export", folder, tmp_path / "x", "--to", "onnx")
    assert code == 2
    assert "mlir-linalg" in err
    assert json.loads(run("export", folder, tmp_path / "there", "--format", "json")[1])["error"]["code"] == "AR601"
