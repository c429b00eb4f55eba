"""torch.compile(model, backend="attnrewrite"): every way of running it, and every way of calling it wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_as_good, exact, run
from spellings import WIDTH, GraphBreak, NanoGPT
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import attnrewrite
from attnrewrite import AttnRewriteError, AttnRewriteWarning, Backend, SelectiveConfig, SSAConfig
from attnrewrite.functional import selective_attention
from attnrewrite.passes.report import Report

X = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def test_by_name_without_an_import() -> None:
    code = (
        "import torch, sys\n"
        "from torch import nn\n"
        "assert 'attnrewrite.backend' not in sys.modules\n"
        "class M(nn.Module):\n"
        "    def forward(self, x): return torch.softmax(x @ x.mT, -1) @ x\n"
        "m, x = M(), torch.randn(2, 5, 8)\n"
        "y = torch.compile(m, backend='attnrewrite', options={'inner': 'eager', 'strict': True})(x)\n"
        "assert torch.allclose(y, m(x), atol=1e-6)\n"
        "assert 'attnrewrite.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_with_the_default_inner_compiler_inference_and_training() -> None:
    model, inputs = NanoGPT(), {"x": X}
    found: list[Report] = []
    compiled = torch.compile(model, backend=Backend(strict=True, report=found.append))
    with torch.no_grad():
        assert close(compiled(X), model(X))
    ordinary, true = run(model, inputs), exact(model, inputs)
    ours = run(compiled, inputs)
    assert_as_good("output", ours[0], ordinary[0], true[0])
    for name, gradient in true[1].items():
        assert_as_good(name, ours[1]["_orig_mod." + name], ordinary[1][name], gradient)
    assert [r.summary["rewritten"] for r in found] == [1, 1]


@pytest.mark.parametrize("train", [True, False])
def test_dynamic_shapes_reuse_one_graph(train: bool) -> None:
    model = NanoGPT()
    found: list[Report] = []
    compiled = torch.compile(model, backend=Backend(inner="aot_eager", strict=True, report=found.append), dynamic=True)
    with torch.set_grad_enabled(train):
        for length in (13, 20, 33):
            x = torch.randn(3, length, WIDTH)
            assert close(compiled(x), model(x))
    assert len({r.sites[0].query_length for r in found}) == 1
    assert isinstance(found[-1].sites[0].query_length, str)
    assert found[-1].sites[0].mask.kind == "causal"


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_inside_and_around(inside: bool) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = NanoGPT()

        def forward(self, x: Tensor) -> Tensor:
            if not inside:
                return self.inner(x)
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.inner(x)
            return out.float()

    model = Cast()
    found: list[Report] = []
    compiled = torch.compile(model, backend=Backend(inner="aot_eager", strict=True, report=found.append))
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        ours, ordinary = compiled(X), model(X)
    true = exact(model.inner, {"x": X})[0]
    assert ours.dtype == ordinary.dtype
    assert_as_good("output", ours.float(), ordinary.float(), true.float())
    assert found[0].summary["rewritten"] == 1


def test_graph_breaks_are_summed_over() -> None:
    model, found = GraphBreak(), list[Report]()
    compiled = torch.compile(model, backend=Backend(inner="eager", strict=True, report=found.append))
    assert close(compiled(X), model(X))
    whole = Report()
    for report in found:
        whole.extend(report)
    assert [(s.layer, s.graph, s.status) for s in whole.sites] == [
        ("first", 0, "rewritten"),
        ("second", 1, "rewritten"),
    ]


def test_a_changed_buffer_is_noticed() -> None:
    model = NanoGPT()
    compiled = torch.compile(model, backend=Backend(inner="eager", strict=True))
    with torch.no_grad():
        assert close(compiled(X), model(X))
        model.bias.copy_(model.bias.clone())  # written, but the same values
        assert close(compiled(X), model(X))
        before = model(X)
        model.bias.copy_(torch.ones_like(model.bias))  # attend to everything
        assert not close(model(X), before)
        assert close(compiled(X), model(X))


def test_equal_backends_share_compiled_code() -> None:
    assert Backend(inner="eager") == Backend(inner="eager")
    assert hash(Backend(targets="a.*")) == hash(Backend(targets=["a.*"]))


def test_report_is_written_as_json(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    torch.compile(GraphBreak(), backend=Backend(inner="eager", report=file))(X)
    data = json.loads(file.read_text())
    assert data["summary"] == {"sites": 2, "rewritten": 2, "matched": 0, "rejected": 0, "skipped": 0}
    assert Report.from_dict(data).sites[1].layer == "second"


def test_targets_and_exclude() -> None:
    model, found = GraphBreak(), list[Report]()
    compiled = torch.compile(model, backend=Backend(inner="eager", exclude="sec*", report=found.append))
    assert close(compiled(X), model(X))
    assert [s.status for r in found for s in r.sites] == ["rewritten", "skipped"]


# --- failures inside the passes --------------------------------------------------------------------------


def test_a_failing_pass_leaves_the_original_graph_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrewrite.passes import pipeline

    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(pipeline, "match", broken)
    model = NanoGPT()
    with pytest.warns(AttnRewriteWarning, match="AR901.*\n.*a defect") as caught:
        assert close(torch.compile(model, backend=Backend(inner="eager"))(X), model(X))
    assert len([w for w in caught if issubclass(w.category, AttnRewriteWarning)]) == 1
    torch._dynamo.reset()
    assert raised(Backend(inner="eager", strict=True), model).code == "AR901"
    torch._dynamo.reset()
    assert raised(Backend(inner="eager", variant=SelectiveConfig(mode="raw")), model).code == "AR901"


def raised(backend: Any, model: nn.Module, *inputs: Tensor) -> AttnRewriteError:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend=backend)(*(inputs or (X,)))
    inner = caught.value.inner_exception
    assert isinstance(inner, AttnRewriteError)
    return inner


# --- selective through the backend -----------------------------------------------------------------------


def test_selective_raw_equals_the_function_and_its_gradients() -> None:
    class Selective(NanoGPT):
        def forward(self, x: Tensor) -> Tensor:
            B, T, C = x.shape
            q, k, v = (y.view(B, T, 4, 8).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, dim=2))
            out = selective_attention(q, k, v)
            return self.c_proj(out.transpose(1, 2).reshape(B, T, C))

    model, by_hand = NanoGPT().double(), Selective().double()
    by_hand.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend=Backend(variant=SelectiveConfig(mode="raw"), inner="aot_eager"))
    ours, expected = run(compiled, {"x": X.double()}), run(by_hand, {"x": X.double()})
    assert close(ours[0], expected[0], 1e-12)
    assert not close(ours[0], run(model, {"x": X.double()})[0], 1e-3)
    for name, gradient in expected[1].items():
        assert close(ours[1]["_orig_mod." + name], gradient, 1e-10)


def test_selective_by_json_and_with_inductor() -> None:
    model = NanoGPT()
    options = {"variant": {"variant": "selective", "mode": "raw", "selection_head": 2}, "strict": True}
    compiled = torch.compile(model, backend="attnrewrite", options=options)
    eager = torch.compile(model, backend=Backend(variant=SelectiveConfig("raw", 2), inner="eager"))
    with torch.no_grad():
        assert close(compiled(X), eager(X), 1e-5)


# --- wrong calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"variannt": "sdpa"}, "AR101", "did you mean 'variant'"),
        ({"inner": "inductr"}, "AR102", "did you mean 'inductor'"),
        ({"kernels": "cuda"}, "AR102", "valid: auto, reference, triton"),
        ({"mode": "max-autotun"}, "AR102", "did you mean 'max-autotune'"),
        ({"strict": "yes"}, "AR102", "True or False"),
        ({"targets": 3}, "AR102", "glob"),
        ({"variant": 3}, "AR102", "a name, a config"),
        ({"variant": "selectiv"}, "AR301", "did you mean 'selective'"),
        ({"variant": {"variant": "selective", "mod": "raw"}}, "AR302", "did you mean 'mode'"),
        ({"variant": {"variant": "selective", "mode": "rwa"}}, "AR303", "did you mean 'raw'"),
        ({"variant": "ssa"}, "AR304", "convert"),
        ({"variant": "selective"}, "AR304", "mode='raw'"),
    ],
)
def test_wrong_options_are_errors_that_say_what_is_right(fields: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(AttnRewriteError) as caught:
        Backend(**fields)
    assert caught.value.code == code
    assert text in str(caught.value)
    if "mode" not in fields:
        model = NanoGPT()
        with pytest.raises(BackendCompilerFailed) as failed:
            torch.compile(model, backend="attnrewrite", options=fields)(X)
        assert getattr(failed.value.inner_exception, "code", None) == code


def test_config_classes_refuse_unknown_and_wrong_fields() -> None:
    with pytest.raises(AttnRewriteError, match="AR302"):
        SSAConfig(gates="head")  # type: ignore[call-arg]  # that is the test
    with pytest.raises(AttnRewriteError, match="AR303"):
        SelectiveConfig(selection_head="0")  # type: ignore[arg-type]  # that is the test


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return torch.softmax(self.q(x) @ self.k(y).mT / WIDTH**0.5, -1) @ self.v(y)


RAW = SelectiveConfig(mode="raw")


def test_selective_is_refused_where_it_is_not_defined() -> None:
    bidirectional = raised(Backend(variant=RAW, inner="eager"), Bidirectional())
    assert (bidirectional.code, "sees all keys" in str(bidirectional)) == ("AR307", True)
    torch._dynamo.reset()
    cross = raised(Backend(variant=RAW, inner="eager"), Bidirectional(), X, torch.randn(2, 7, WIDTH))
    assert (cross.code, "different sequences" in str(cross)) == ("AR307", True)
    torch._dynamo.reset()
    head = raised(Backend(variant=SelectiveConfig("raw", 4), inner="eager"), NanoGPT())
    assert (head.code, "has 4 heads" in str(head)) == ("AR307", True)


def test_a_variant_that_cannot_be_applied_is_never_skipped() -> None:
    assert raised(Backend(variant=RAW, inner="eager"), nn.Linear(WIDTH, WIDTH)).code == "AR201"
    torch._dynamo.reset()
    nothing = raised(Backend(variant=RAW, inner="eager", targets="layers.*"), GraphBreak())
    assert (nothing.code, "first" in str(nothing)) == ("AR306", True)

    class Two(nn.Module):
        """One attention that sees all keys, and one whose weights are changed after the softmax."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Bidirectional(), Bidirectional()

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.softmax(self.b.q(x) @ self.b.k(x).mT, -1) * x[:, None, :, 0]
            return self.a(x) + weights @ self.b.v(x)

    torch._dynamo.reset()
    mixed = raised(Backend(variant=RAW, inner="eager"), Two())
    assert (mixed.code, "AR203" in str(mixed), "AR307" in str(mixed)) == ("AR312", True, True)


def test_public_names_are_all_there() -> None:
    for name in attnrewrite.__all__:
        assert getattr(attnrewrite, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = attnrewrite.convrt
